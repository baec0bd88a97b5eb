"""Sums by owners: a rank adds up its own rows of a token and sends one, rounded.

Every backend gives the bits of the reference (tests/test_buffer_properties.py draws these calls,
too); here are the order written by hand, what the roundings may cost, and rows that stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import compare
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ep_comm import Buffer, Received, reference
from ep_comm.testing import Cluster

R, E, K, H, T = 3, 6, 6, 32, 24
LAYOUTS: dict[str, dict[str, Any]] = {
    "grouped": {"layout": "grouped", "alignment": 4},
    "grouped-static": {"layout": "grouped", "sync": False},
    "slab": {"layout": "slab"},
    "slab-static": {"layout": "slab", "capacity": 2 * T * R, "sync": False},
}


@pytest.fixture(scope="module", params=["cpu", "collective"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with Cluster(1, R) as ranks:
        ranks.make_buffers(num_experts=E, num_topk=K, hidden=H, max_tokens=T, backend=request.param)
        yield ranks


# ---- by hand ----


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_round_their_sums_and_sources_add_them_ascending(
    cluster: Cluster, layout: str
) -> None:
    # Experts 0 and 1 are rank 0's, 2 and 3 rank 1's, 4 and 5 rank 2's. 256 + 1 is no bfloat16, nor
    # is 256 + 1 + 1 when 256 + 1 is rounded first.
    ids = torch.tensor([[5, 0, 2, 1, 4, -1], [3, 0, 2, 1, -1, -1], [-1] * 6])
    rows = torch.tensor([[1.0, 256, 3, 1, -300, 0], [1, 0.5, 256, 256, 0, 0], [0.0] * 6])
    # Token 0: rank 0 sends 256 + 1 = 256, rank 1 sends 3, rank 2 sends 1 - 300 = -299 -> -300 or
    # -298: of two bfloat16 as near it is the even one, -300. 256 + 3 - 300 = -41.
    # Token 1: rank 0 sends 0.5 + 256 = 256, rank 1 sends 1 + 256 = 256.
    sums = torch.tensor([-41.0, 512.0, 0.0])

    def work(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        buffer: Buffer = cluster.buffers[rank]
        x = torch.ones(3, H, dtype=torch.bfloat16)
        recv = buffer.dispatch(x, ids, rows, **LAYOUTS[layout])
        assert recv.topk_weights is not None
        y = (recv.x.float() * recv.topk_weights.unsqueeze(-1)).bfloat16()
        plain = buffer.combine(y, recv.handle, per_rank=True)
        ones = torch.where((recv.topk_idx == -1).unsqueeze(-1), float("nan"), 1.0).bfloat16()
        weighted = buffer.combine(
            ones.expand(recv.x.shape).contiguous(),
            recv.handle,
            per_rank=True,
            row_weights=recv.topk_weights,
        )
        bias = torch.full((3, H), 1.0, dtype=torch.bfloat16)
        return plain, weighted, buffer.combine(y, recv.handle, per_rank=True, bias=bias)

    for plain, weighted, with_bias in cluster.run(work):
        want = sums.bfloat16().unsqueeze(1).expand(3, H)
        compare.same_bits(plain, want)
        compare.same_bits(weighted, want)
        # The bias comes first: 1 + 256 + 3 - 300 and 1 + 256 + 256, rounded once.
        compare.same_bits(with_bias, (sums + 1).bfloat16().unsqueeze(1).expand(3, H))


# ---- what it may cost ----

UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
TINY = {torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25, torch.float32: 2.0**-150}


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    spread=st.sampled_from([0, 2, 7, 20]),
    cancels=st.booleans(),
    weighted=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_one_rounding_more_for_each_rank_is_all_it_costs(
    dtype: torch.dtype, spread: int, cancels: bool, weighted: bool, biased: bool, seed: int
) -> None:
    """The bound of `Buffer.combine`, against sums in float64, whose own error is nothing beside."""
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(-1, E, (T, K), generator=g) for _ in range(R)]
    weights = [torch.randn(T, K, generator=g) for _ in range(R)]

    def values(*shape: int) -> Tensor:
        size = torch.exp2(torch.randint(-spread, 1, (*shape[:-1], 1), generator=g).float())
        made = torch.randn(shape, generator=g) * size
        if cancels:  # sums near zero of terms that are not
            made = torch.where(torch.rand(shape, generator=g) < 0.5, made.abs().ceil(), -1.0)
        return made.to(dtype)

    x = [torch.zeros(T, H, dtype=dtype) for _ in range(R)]
    received = reference.dispatch(x, ids, weights, num_experts=E, max_tokens=T, layout="grouped")
    y = [values(*r.x.shape) for r in received]
    factors = [r.topk_weights for r in received] if weighted else None
    bias = [values(T, H) for _ in range(R)] if biased else None
    handles = [r.handle for r in received]
    got = reference.combine(y, handles, per_rank=True, row_weights=factors, bias=bias)

    for source in range(R):
        terms = _terms(received, y, factors, source)  # [T, R, K, H] float64, 0 where none
        start = torch.zeros(T, H) if bias is None else bias[source]
        sums = terms.sum(2)  # of each rank
        exact = start.double() + sums.sum(1)
        u, unit32, n = UNIT[dtype], 2.0**-24, K + R + 2
        float32 = n * unit32 / (1 - n * unit32)  # of a term, over all additions it takes part in
        in_sums = float32 * terms.abs().sum((1, 2))
        extra = u * sums.abs().sum(1) + R * TINY[dtype]  # what per_rank adds, to first order
        total = (1 + u) * (1 + float32) * (in_sums + extra) + float32 * start.double().abs()
        bound = (1 + u) * total + float32 * (1 + u) * exact.abs() + u * exact.abs() + TINY[dtype]
        off = (got[source].double() - exact).abs()
        assert (off <= bound).all(), float((off / bound).max())


def _terms(
    received: list[Received], y: list[Tensor], factors: list[Tensor] | None, source: int
) -> Tensor:
    terms = torch.zeros(T, R, K, H, dtype=torch.float64)
    for owner, recv in enumerate(received):
        for (src, token), rows in zip(
            recv.handle.recv_src.tolist(), recv.handle.recv_row.tolist(), strict=True
        ):
            for slot, row in enumerate(rows):
                if src != source or row < 0:
                    continue
                factor = 1.0 if factors is None else factors[owner][row].double()
                terms[token, owner, slot] = factor * y[owner][row].double()
    return terms


def test_the_bound_is_no_larger_than_it_has_to_be() -> None:
    """One token, two ranks, rows that each round half a unit away: the error is what is stated."""
    ids = torch.tensor([[0, 1, 2, 3]])
    received = reference.dispatch(
        [torch.zeros(1, 8).bfloat16(), torch.zeros(0, 8).bfloat16()], [ids, ids[:0]],
        num_experts=4, max_tokens=1, layout="grouped",
    )  # fmt: skip
    y = [torch.empty(2, 8).bfloat16() for _ in range(2)]
    for rows, sign in zip(y, (1.0, -1.0), strict=True):
        rows[0], rows[1] = sign * 1.0, 2.0**-8 * (1 + 2.0**-7)  # just above and just below a half
    out, _ = reference.combine(y, [r.handle for r in received], per_rank=True)
    exact = 2 * 2.0**-8 * (1 + 2.0**-7)
    assert abs(float(out[0, 0]) - exact) > 0.4 * 2 * 2.0**-8  # of u * (|sum| + |sum|)


# ---- rows that stream ----


@pytest.mark.parametrize("place", ["arena", "torch"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_many_sums_stream_through_rings_that_are_smaller(place: str, weighted: bool) -> None:
    num_ranks, tokens, hidden = 3, 700, 2048  # 2.8 MB to each rank, rings of 0.5 MB in all
    g = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 6, (tokens - 13 * r, 4), generator=g) for r in range(num_ranks)]
    x = [torch.randn(i.shape[0], hidden, generator=g).bfloat16() for i in ids]
    weights = [torch.rand(i.shape, generator=g) for i in ids]
    options: dict[str, Any] = {"num_experts": 6, "max_tokens": tokens}
    want = reference.dispatch(x, ids, weights, layout="grouped", **options)
    factors = [w.topk_weights for w in want] if weighted else None
    sums = reference.combine(
        [w.x for w in want], [w.handle for w in want], per_rank=True, row_weights=factors
    )
    with Cluster(1, num_ranks) as cluster:
        buffers = cluster.make_buffers(num_topk=4, hidden=hidden, **options)

        def work(rank: int) -> Tensor:
            recv = buffers[rank].dispatch(x[rank], ids[rank], weights[rank], layout="grouped")
            y = recv.x if place == "arena" else recv.x.clone()
            begun = buffers[rank].combine(
                y, recv.handle, per_rank=True, wait=False,
                row_weights=recv.topk_weights if weighted else None,
            )  # fmt: skip
            total: Tensor = begun.wait()
            return total

        for got, expected in zip(cluster.run(work), sums, strict=True):
            compare.same_bits(got, expected)
