"""Every result against the oracle, bit by bit, before anything is timed.

The oracle computes all ranks at once, so it runs on a slice of columns at a time: routing does not
depend on the columns, and neither does any element on those of other slices. All rows and all
columns are compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from ep_comm import reference
from ep_comm.bench.cases import SCALE_BLOCK, Case, Inputs, make_inputs
from ep_comm.received import Received

SLICE: Final = 8 * SCALE_BLOCK  # columns; a multiple of what four packed exponents cover
WHAT: Final = "all rows and columns, bit for bit, against ep_comm.reference"


class Mismatch(AssertionError):
    """A result that differs from the oracle's."""


def expert_output(x: Tensor, rank: int, case: Case) -> Tensor:
    """An answer of the experts that differs from row to row and rank to rank, in x's shape."""
    rows = torch.arange(x.shape[:-1].numel(), device=x.device).view(*x.shape[:-1], 1)
    factor = ((rows * 37 + rank * 11) % 64 + 32).to(torch.float32) / 64
    return (x.to(torch.float32) * factor).to(case.result_dtype)


def specified_rows(received: Received, shape: torch.Size) -> Tensor:
    """Which rows of x are promised: bool [rows], or [El, capacity] for a slab."""
    counts = received.num_tokens_per_expert
    if received.layout == "slab":
        return torch.arange(shape[1]) < counts.unsqueeze(1)
    if received.layout == "grouped":
        assert received.offsets is not None
        return torch.arange(shape[0]) < received.offsets[-1]
    return torch.arange(shape[0]) < int(received.num_recv)


def check_case(case: Case, rank: int, got: dict[str, Any]) -> None:
    """Compare what one rank got with what it must get.

    Args:
        got: by operation: "dispatch" and "dispatch_cached" a Received, "combine" and
            "combine_tensor" the sums of `expert_output` of what was received.
    Raises:
        Mismatch: names the first field that differs.
    """
    inputs = [make_inputs(case, r) for r in range(case.ranks)]
    dispatched: Received = got["dispatch"]
    for first, part in _slices(case, inputs):
        want = _oracle_dispatch(part, inputs)
        columns = slice(first, first + part.hidden)
        if first == 0:
            _compare_routing(case, dispatched, want[rank])
        for op in ("dispatch", "dispatch_cached"):
            if op in got:
                _compare_rows(op, got[op], dispatched, want[rank], columns)
        answers = [expert_output(w.x, r, case) for r, w in enumerate(want)]
        handles = [w.handle for w in want]
        sums = reference.combine(answers, handles, ranks_per_node=case.ranks_per_node)
        for op in ("combine", "combine_tensor"):
            if op in got:
                _same(f"{op} columns {first}+", got[op][:, columns], sums[rank])


def _slices(case: Case, inputs: list[Inputs]) -> Iterator[tuple[int, Case]]:
    """The case cut into slices of columns; `inputs` holds one slice of each rank at a time."""
    whole = list(inputs)
    for first in range(0, case.hidden, SLICE):
        width = min(SLICE, case.hidden - first)
        blocks = slice(first // SCALE_BLOCK, (first + width) // SCALE_BLOCK)
        for r, i in enumerate(whole):
            scales = None if i.scales is None else i.scales[:, blocks]
            inputs[r] = i._replace(x=i.x[:, first : first + width], scales=scales)
        yield first, replace(case, hidden=width)


def _oracle_dispatch(case: Case, inputs: list[Inputs]) -> list[Received]:
    scales = [i.scales for i in inputs if i.scales is not None]
    return reference.dispatch(
        [i.x for i in inputs],
        [i.topk_idx for i in inputs],
        [i.topk_weights for i in inputs],
        num_experts=case.experts,
        max_tokens=case.tokens,
        layout=case.layout,
        alignment=case.alignment,
        capacity=case.capacity,
        scales=scales or None,
        quantize=case.quantize,
        sync=not case.static,
    )


def _compare_routing(case: Case, got: Received, want: Received) -> None:
    """What does not depend on columns."""
    if int(got.num_recv) != int(want.num_recv) or int(got.status) != 0:
        raise Mismatch(f"num_recv is {got.num_recv}, the oracle has {want.num_recv}")
    for name in ("num_tokens_per_expert", "topk_idx", "topk_weights", "offsets"):
        _same(name, getattr(got, name), getattr(want, name))
    for name in ("send_row", "recv_src", "rank_counts"):
        _same(f"handle.{name}", getattr(got.handle, name), getattr(want.handle, name))
    rows, recv_row = want.handle.recv_row, got.handle.recv_row
    if case.backend == "hybrid":  # behind our rows it has what crossed here
        recv_row = recv_row[: rows.shape[0]]
    _same("handle.recv_row", recv_row, rows)


def _compare_rows(
    op: str, got: Received, dispatched: Received, want: Received, columns: slice
) -> None:
    if got.x.shape[:-1] != want.x.shape[:-1]:
        raise Mismatch(f"{op}: x is {list(got.x.shape)}, the oracle has {list(want.x.shape)}")
    rows = specified_rows(dispatched, got.x.shape)
    _same(f"{op}: x", as_bits(got.x)[..., columns][rows], as_bits(want.x)[rows])
    if want.scales is not None:
        assert got.scales is not None
        width = want.scales.shape[-1]
        first = columns.start * want.scales.shape[-1] // (columns.stop - columns.start)
        scales = got.scales[..., first : first + width]
        _same(f"{op}: scales", scales[rows], want.scales[rows])


def as_bits(x: Tensor) -> Tensor:
    """The same elements as integers of their size: bits are compared, NaN included."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.dtype.itemsize])


def _same(what: str, got: Tensor | None, want: Tensor | None) -> None:
    if (got is None) != (want is None):
        raise Mismatch(f"{what}: got {got is not None}, the oracle has {want is not None}")
    if got is None or want is None:
        return
    if got.dtype != want.dtype or got.shape != want.shape:
        mine, theirs = f"{got.dtype} {list(got.shape)}", f"{want.dtype} {list(want.shape)}"
        raise Mismatch(f"{what}: got {mine}, the oracle has {theirs}")
    if got.is_floating_point():
        got, want = as_bits(got), as_bits(want)
    if not torch.equal(got, want):
        bad = (got != want).nonzero()
        where = f"first at {bad[0].tolist()}"
        raise Mismatch(f"{what}: {len(bad)} elements differ from the oracle's, {where}")


def digest(tensor: Tensor) -> bytes:
    """To see after timing that the last result is still the one that was checked."""
    flat = tensor.contiguous().view(-1)
    return hashlib.blake2b(as_bits(flat).view(torch.uint8).numpy().data, digest_size=16).digest()
