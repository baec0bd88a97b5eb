"""Which kernels calls run. Not among the loopback cases, since those run under sanitizers, too, and
one of these has for itself what a profiler needs of the driver.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_nvlink_loopback import SLAB, STATIC, Case, make_cluster, on_gpu
from torch.profiler import ProfilerActivity, profile

from ep_comm.testing import Cluster

__all__ = ["make_cluster"]

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("dispatch", "combine"),
    [
        (STATIC, {}),
        ({**SLAB, "quantize": "fp8"}, {"per_rank": True}),
        (SLAB, {"weighted": True, "order": "topk"}),
    ],
    ids=["compact", "slab", "unreduced"],
)
def test_usual_calls_run_kernels_of_their_own(
    make_cluster: Callable[..., Cluster], dispatch: dict[str, Any], combine: dict[str, Any]
) -> None:
    case = Case(num_ranks=1, tokens=(9,), num_sms=None, options=dispatch)
    inputs = case.inputs()
    (buffer,) = make_cluster(1, **case.buffer_options()).buffers
    x, idx, weights = (on_gpu(t) for t in (inputs.x, inputs.topk_idx, inputs.topk_weights))
    assert x is not None
    assert idx is not None
    assert weights is not None

    def kernels(**more: Any) -> list[bool]:
        """Of those of a dispatch and a combine, which are for usual calls."""
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            recv = buffer.dispatch(x[0], idx[0], weights[0], **case.options, **more)
            buffer.combine(torch.zeros_like(recv.x, dtype=torch.bfloat16), recv.handle, **combine)
            torch.cuda.synchronize()
        names = [e.name for e in seen.events() if "kernels::stage_" in e.name]
        return ["Usual" in name for name in names]

    assert kernels() == [True, True]
    assert kernels(wait_stats=torch.zeros(1, dtype=torch.int64, device="cuda")) == [False, True]
