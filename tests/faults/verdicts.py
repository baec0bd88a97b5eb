"""What tests of faults share: ranks that talk, verdicts, and what a survivor saw."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from patience import within
from torch import Tensor

from ep_comm import Buffer
from ep_comm.errors import EPError

SHAPE: dict[str, Any] = {"num_experts": 6, "num_topk": 2, "hidden": 32, "max_tokens": 8}


def inputs(rank: int, seed: int = 0, tokens: int = 8) -> tuple[Tensor, Tensor]:
    """Tokens whose two experts are always 0..2 and 3..5: on different ranks of 2 and of 3."""
    g = torch.Generator().manual_seed(100 * seed + rank)
    x = torch.randint(-8, 8, (tokens, 32), generator=g).float()
    first = torch.randint(0, 3, (tokens, 1), generator=g)
    return x, torch.cat([first, first + 3], 1)


def round_trip(buffer: Buffer, seed: int = 0, tokens: int = 8) -> None:
    x, idx = inputs(buffer.rank, seed, tokens)
    recv = buffer.dispatch(x, idx)
    assert torch.equal(buffer.combine(recv.x, recv.handle), x * 2)


def raised(call: Callable[[], Any]) -> EPError:
    with pytest.raises(EPError) as caught:
        call()
    return caught.value


def check_verdict(error: BaseException, rank: int, code: str, peer: int) -> None:
    assert isinstance(error, EPError), error
    text = str(error)
    assert (error.code, error.rank, error.peer) == (code, rank, peer), text
    assert text.startswith(f"{type(error).__name__}[{code}]: rank {rank} "), text
    assert ". Fix: " in text
    assert len(text) <= 400
    assert error.as_dict()["peer"] == peer


def round_trip_of(buffer: Buffer, seed: int) -> None:
    """In groups of any size."""
    x, _ = inputs(buffer.rank, seed)
    idx = (torch.arange(8)[:, None] + buffer.rank + seed) % 6
    recv = buffer.dispatch(x, idx)
    assert torch.equal(buffer.combine(recv.x, recv.handle), x)


@dataclass
class Survivor:
    """What a rank saw of a fault, with times of `time.monotonic`."""

    error: EPError
    when: float
    again: EPError  # of the next call
    again_s: float
    close_s: float


def survive(buffer: Buffer, step: Callable[[int], Any]) -> Survivor:
    """Call step(0), step(1), ... until one raises; then see what still works."""
    try:
        for i in range(10**9):
            step(i)
    except EPError as error:
        when = time.monotonic()
        again = raised(lambda: step(0))
        again_s = time.monotonic() - when
        start = time.monotonic()
        buffer.close()
        return Survivor(error, when, again, again_s, time.monotonic() - start)
    raise AssertionError


def check_survivor(
    seen: Any, rank: int, code: str, culprit: int, died: float, limit_s: float = 1.0
) -> None:
    """In a test of `three_tries`, since these are promises about time."""
    assert isinstance(seen, Survivor), seen
    check_verdict(seen.error, rank, code, culprit)
    assert seen.again.code == code
    within(limit_s, seen.when - died, f"rank {rank}: {seen.error}")
    within(0.1, seen.again_s, "another call")
    within(1.0, seen.close_s, "close()")
