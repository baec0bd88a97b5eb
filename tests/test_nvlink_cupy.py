"""CuPy arrays go in as they are, without a copy."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import test_nvlink_gpus as gpus
import test_nvlink_loopback as loopback
import torch
from compare import same_bits, same_values

from ep_comm import reference

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy")


def arrays(me: ranks.Me) -> None:
    case = loopback.Case(num_ranks=me.size, dtype=torch.float32)
    buffer = gpus.buffer_of(me, case)
    inputs = case.inputs()
    want = loopback.want_dispatch(case, inputs)
    with cupy.cuda.Device(torch.cuda.current_device()):
        x, idx, weights = (
            cupy.asarray(part[me.rank].numpy())
            for part in (inputs.x, inputs.topk_idx, inputs.topk_weights)
        )
        cupy.cuda.get_current_stream().synchronize()
        recv: Any = buffer.dispatch(x, idx, weights)
        loopback.check_received(recv, want[me.rank], computed=False)
        y = cupy.from_dlpack(recv.x)  # arena memory as a CuPy array, and back
        assert y.data.ptr == recv.x.data_ptr()
        out = buffer.combine(y, recv.handle)
    sums = reference.combine([w.x for w in want], [w.handle for w in want])
    same_values(out.cpu(), sums[me.rank])
    same_bits(torch.from_dlpack(x).cpu(), inputs.x[me.rank], "the input")


def test_cupy_arrays_are_dispatched_and_combined() -> None:
    ranks.run(arrays, 2)
