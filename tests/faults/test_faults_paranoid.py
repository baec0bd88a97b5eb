"""Paranoid mode (H1): exact as ever, and damage between ranks is told instead of returned."""

from __future__ import annotations

import ctypes
import threading
import time
from typing import Any

import pytest
import torch
from verdicts import SHAPE, inputs, raised

from ep_comm import Buffer, EPConfig
from ep_comm.errors import EPCorruption, EPEnvironmentError, EPError
from ep_comm.testing import Cluster

PARANOID = EPConfig(arrival_s=60.0, progress_s=60.0, paranoid=True)
CALLS: dict[str, dict[str, Any]] = {
    "compact": {},
    "grouped": {"layout": "grouped", "alignment": 4},
    "slab": {"layout": "slab"},
    "static": {"sync": False},
    "fp8": {"quantize": "fp8", "scale_block": 32},
}


@pytest.mark.parametrize("call", CALLS)
def test_h1_paranoid_mode_changes_no_result(call: str) -> None:
    options = CALLS[call]
    results: list[list[Any]] = []
    for config in (EPConfig(), PARANOID):
        with Cluster(1, 3) as cluster:
            cluster.make_buffers(**SHAPE, config=config)

            def work(rank: int, cluster: Cluster = cluster) -> Any:
                buffer = cluster.buffers[rank]
                x, idx = inputs(rank)
                weights = torch.arange(16.0).view(8, 2)
                first = buffer.dispatch(x, idx, weights, **options)
                again = buffer.dispatch(x, handle=first.handle, quantize=options.get("quantize"),
                                        scale_block=32)  # fmt: skip
                y = again.x.float()
                return first.topk_idx, first.topk_weights, buffer.combine(y, again.handle)

            results.append(cluster.run(work))
    for plain, paranoid in zip(*results, strict=True):
        for ours, theirs in zip(plain, paranoid, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layout", ["compact", "slab"])
def test_h1_rows_that_nothing_was_sent_to_are_poisoned(layout: str) -> None:
    with Cluster(1, 2) as cluster:
        cluster.make_buffers(**SHAPE, config=PARANOID)

        def work(rank: int) -> None:
            x, idx = inputs(rank, tokens=4)
            recv = cluster.buffers[rank].dispatch(x, idx, layout=layout, sync=False)
            assert recv.topk_idx is not None
            nowhere = (recv.topk_idx == -1).all(-1) if layout == "compact" else recv.topk_idx == -1
            assert nowhere.any()
            assert recv.x[nowhere].isnan().all()
            assert not recv.x[~nowhere].isnan().any()

        cluster.run(work)


class Flipper:
    """Overwrites a stretch of a rank's arena, over and over, while operations run."""

    def __init__(self, buffer: Buffer, first: int, num_bytes: int) -> None:
        self._address = buffer._backend._memory.own.arena.address + first  # type: ignore[attr-defined]
        self._bytes = num_bytes
        self._over = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over:
            ctypes.memset(self._address, 0x5A, self._bytes)

    def stop(self) -> None:
        self._over = True
        self._thread.join()


@pytest.mark.parametrize("cached", [False, True], ids=["fresh", "cached"])
@pytest.mark.parametrize("layout", ["compact", "grouped", "slab"])
def test_h1_damaged_rows_are_e241_on_every_rank(layout: str, cached: bool) -> None:
    """The first bytes of rank 1's arena: rows of x, of whatever call comes first."""
    with Cluster(1, 3) as cluster:
        cluster.make_buffers(**{**SHAPE, "hidden": 4096}, config=PARANOID)

        def work(rank: int) -> Any:
            buffer = cluster.buffers[rank]
            x = torch.full((8, 4096), 1.0 + rank)
            idx = inputs(rank)[1]
            handle = buffer.dispatch(x, idx, layout=layout).handle
            flipper = Flipper(buffer, 0, 4096 * 4) if rank == 1 else None
            end = time.monotonic() + 60
            try:
                while time.monotonic() < end:
                    if cached:
                        buffer.dispatch(x, handle=handle)
                    else:
                        buffer.dispatch(x, idx, layout=layout)
            finally:
                if flipper is not None:
                    flipper.stop()

        errors = cluster.run_catching(work, limit_s=200)
        for rank, error in enumerate(errors):
            assert isinstance(error, EPCorruption), (rank, error)
            assert error.code == "E241"
            assert "does not fit its checksum" in str(error)
        assert len({e.peer for e in errors}) == 1  # type: ignore[union-attr]
        again = raised(lambda: cluster.buffers[0].dispatch(*inputs(0)))
        assert again.code in ("E241", "E201")


def test_h1_damage_anywhere_ends_in_a_code_and_never_in_wrong_rows() -> None:
    """Rows, records, ids, seals: whatever is hit, the call raises, or what it returns was whole
    when it was looked at."""
    with Cluster(1, 2) as cluster:
        cluster.make_buffers(**SHAPE, config=PARANOID, arena_bytes=1 << 18)

        def work(rank: int) -> Any:
            buffer = cluster.buffers[rank]
            flipper = Flipper(buffer, 0, 1 << 14) if rank == 1 else None
            try:
                for i in range(200_000):
                    buffer.dispatch(*inputs(rank, i % 3), layout="grouped")
            finally:
                if flipper is not None:
                    flipper.stop()

        for error in cluster.run_catching(work, limit_s=200):
            assert isinstance(error, EPError), error
            assert error.code in ("E240", "E241", "E242"), error


def test_paranoid_mode_is_refused_where_there_is_none() -> None:
    error = raised(lambda: Buffer(**SHAPE, backend="collective", device="cpu", config=PARANOID))
    assert isinstance(error, EPEnvironmentError)
    assert error.code == "E404"
    assert "no paranoid mode" in str(error)
    assert raised(lambda: EPConfig(paranoid=1)).code == "E203"  # type: ignore[arg-type]
