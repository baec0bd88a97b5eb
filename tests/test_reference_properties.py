"""Properties of the reference over random routings, against a model in plain loops.

The model below restates the rules with lists of (source rank, source token, slot) and nothing else,
so it shares neither code nor technique with the reference. Rows carry a tag that is unique per
token, so a lost, doubled or misplaced one shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ep_comm import reference
from ep_comm.errors import EPError
from ep_comm.handle import Handle
from ep_comm.received import Received

HIDDEN = 4
LAYOUTS = ("compact", "grouped", "slab")

bounded = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
few = settings(bounded, max_examples=20)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- Cases ----


@dataclass(frozen=True)
class Case:
    """One routing of all ranks. Selections are (source rank, source token, slot)."""

    num_ranks: int
    num_experts: int
    num_topk: int
    max_tokens: int
    alignment: int
    owner: list[int]  # [E]
    expert_map: list[int] | None
    topk_idx: list[list[list[int]]]  # [R][T][K]

    @property
    def options(self) -> dict[str, Any]:
        return {
            "num_experts": self.num_experts,
            "max_tokens": self.max_tokens,
            "expert_map": self.expert_map,
        }

    def local_experts(self, rank: int) -> list[int]:
        return [e for e in range(self.num_experts) if self.owner[e] == rank]

    def compact(self, rank: int) -> list[tuple[int, int]]:
        """(source rank, token) that choose at least one expert of `rank`."""
        local = self.local_experts(rank)
        return [
            (source, token)
            for source in range(self.num_ranks)
            for token, chosen in enumerate(self.topk_idx[source])
            if any(expert in local for expert in chosen)
        ]

    def local_id(self, rank: int, row: tuple[int, int, int]) -> int:
        source, token, slot = row
        return self.local_experts(rank).index(self.topk_idx[source][token][slot])

    def group(self, expert: int) -> list[tuple[int, int, int]]:
        """Selections of one expert."""
        return [
            (source, token, slot)
            for source in range(self.num_ranks)
            for token, chosen in enumerate(self.topk_idx[source])
            for slot, e in enumerate(chosen)
            if e == expert
        ]

    def grouped(self, rank: int) -> list[tuple[int, int, int] | None]:
        """Rows of all groups of a rank; None = padding."""
        rows: list[tuple[int, int, int] | None] = []
        for expert in self.local_experts(rank):
            rows += self.group(expert)
            rows += [None] * (-len(rows) % self.alignment)
        return rows

    def fullest_expert(self) -> int:
        return max(len(self.group(e)) for e in range(self.num_experts))

    def tokens(self) -> Iterator[tuple[int, int]]:
        for source in range(self.num_ranks):
            for token in range(len(self.topk_idx[source])):
                yield source, token

    def ids(self, dtype: torch.dtype = torch.int64) -> list[Tensor]:
        return [
            torch.tensor(rows, dtype=dtype).reshape(len(rows), self.num_topk)
            for rows in self.topk_idx
        ]

    def tagged_x(self) -> list[Tensor]:
        """[T, 4] per rank, filled with tag(source, token)."""
        return [
            torch.tensor([tag(source, t) for t in range(len(rows))])
            .reshape(-1, 1)
            .expand(-1, HIDDEN)
            .contiguous()
            for source, rows in enumerate(self.topk_idx)
        ]

    def tagged_weights(self) -> list[Tensor]:
        """[T, K] per rank: tag of the token plus a part for the slot."""
        return [
            torch.tensor(
                [[weight_tag(source, t, k) for k in range(self.num_topk)] for t in range(len(rows))]
            ).reshape(len(rows), self.num_topk)
            for source, rows in enumerate(self.topk_idx)
        ]

    def random(self, *shape_tail: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [
            torch.randn(len(rows), *shape_tail, generator=generator, dtype=torch.float64).to(dtype)
            for rows in self.topk_idx
        ]


def tag(source: int, token: int) -> float:
    return float(source * 16 + token + 1)


def weight_tag(source: int, token: int, slot: int) -> float:
    return tag(source, token) + (slot + 1) / 8


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_ranks = draw(st.integers(1, 6))
    num_experts = draw(st.integers(1, 9))
    num_topk = draw(st.integers(1, 4))
    max_tokens = draw(st.integers(1, 5))
    expert_map = None
    if draw(st.booleans()):
        ranks = st.integers(0, num_ranks - 1)
        expert_map = draw(st.lists(ranks, min_size=num_experts, max_size=num_experts))
    small, larger = divmod(num_experts, num_ranks)
    blocks = [rank for rank in range(num_ranks) for _ in range(small + (rank < larger))]
    chosen = st.lists(st.integers(-1, num_experts - 1), min_size=num_topk, max_size=num_topk)
    topk_idx = [draw(st.lists(chosen, max_size=max_tokens)) for _ in range(num_ranks)]
    return Case(
        num_ranks=num_ranks,
        num_experts=num_experts,
        num_topk=num_topk,
        max_tokens=max_tokens,
        alignment=draw(st.integers(1, 4)),
        owner=blocks if expert_map is None else expert_map,
        expert_map=expert_map,
        topk_idx=topk_idx,
    )


def dispatch(case: Case, layout: str, **options: Any) -> list[Received]:
    """Dispatch the tagged tokens of a case."""
    given_options = {**case.options, "layout": layout, **options}
    if layout != "slab":
        given_options.setdefault("alignment", case.alignment)
    elif given_options.get("capacity") is None:
        given_options["capacity"] = case.num_ranks * case.max_tokens * case.num_topk
    x = given_options.pop("x", None) or case.tagged_x()
    weights = given_options.pop("topk_weights", None) or case.tagged_weights()
    return reference.dispatch(x, case.ids(), weights, **given_options)


def handles(received: Sequence[Received]) -> list[Handle]:
    return [r.handle for r in received]


def present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def flat_x(received: Received) -> Tensor:
    """x as [rows, H] in every layout."""
    return received.x.reshape(-1, received.x.shape[-1])


# ---- Where rows lie ----


@bounded
@given(cases())
def test_compact_has_each_token_once_per_rank_in_source_order(case: Case) -> None:
    for rank, recv in enumerate(dispatch(case, "compact")):
        want = case.compact(rank)
        local = case.local_experts(rank)
        assert recv.x[:, 0].tolist() == [tag(*src) for src in want]
        assert recv.x.shape == (len(want), HIDDEN)
        assert recv.num_recv == len(want)
        assert recv.handle.recv_src.tolist() == [list(src) for src in want]
        assert recv.counts == [len(case.group(e)) for e in local]
        ids, weights = present(recv.topk_idx).tolist(), present(recv.topk_weights).tolist()
        for row, (source, token) in enumerate(want):
            for slot, expert in enumerate(case.topk_idx[source][token]):
                here = expert in local
                assert ids[row][slot] == (local.index(expert) if here else -1)
                assert weights[row][slot] == (weight_tag(source, token, slot) if here else 0)


@bounded
@given(cases())
def test_grouped_has_each_selection_once_in_its_aligned_group(case: Case) -> None:
    for rank, recv in enumerate(dispatch(case, "grouped")):
        want = case.grouped(rank)
        local = case.local_experts(rank)
        assert recv.x[:, 0].tolist() == [tag(*row[:2]) if row else 0 for row in want]
        weights = [weight_tag(*row) if row else 0 for row in want]
        assert present(recv.topk_weights).tolist() == weights
        ids = [case.local_id(rank, row) if row else -1 for row in want]
        assert present(recv.topk_idx).tolist() == ids
        offsets = present(recv.offsets).tolist()
        assert offsets[0] == 0
        assert offsets[-1] == len(want)
        for i, expert in enumerate(local):
            size = len(case.group(expert))
            assert offsets[i] % case.alignment == 0
            assert size <= offsets[i + 1] - offsets[i] < size + case.alignment
            assert recv.counts[i] == size


@bounded
@given(cases())
def test_slab_has_the_rows_of_each_group_from_zero(case: Case) -> None:
    capacity = max(case.fullest_expert(), 1)
    for rank, recv in enumerate(dispatch(case, "slab", capacity=capacity)):
        local = case.local_experts(rank)
        assert recv.x.shape == (len(local), capacity, HIDDEN)
        for i, expert in enumerate(local):
            group = case.group(expert)
            n = len(group)
            assert recv.counts[i] == n
            assert recv.x[i, :n, 0].tolist() == [tag(*row[:2]) for row in group]
            assert present(recv.topk_weights)[i, :n].tolist() == [weight_tag(*r) for r in group]
            assert present(recv.topk_weights)[i, n:].eq(0).all()
            assert present(recv.topk_idx)[i].tolist() == [i] * n + [-1] * (capacity - n)


@bounded
@given(cases())
def test_row_index_expands_compact_rows_to_the_grouped_ones(case: Case) -> None:
    compact = dispatch(case, "compact", row_index=True)
    for a, b in zip(compact, dispatch(case, "grouped"), strict=True):
        index = present(a.row_index)
        padded = torch.cat([a.x, torch.zeros(1, HIDDEN)])  # row -1
        assert torch.equal(padded[index.long()], b.x)
        assert torch.equal(present(a.offsets), present(b.offsets))
        assert torch.equal(index >= 0, present(b.topk_idx) >= 0)


@bounded
@given(cases(), st.sampled_from(LAYOUTS), st.booleans())
def test_handle_rows_lead_from_tokens_to_rows_and_back(case: Case, layout: str, sync: bool) -> None:
    received = dispatch(case, layout, sync=sync, capacity=roomy(case, layout))
    x = case.tagged_x()
    seen: dict[tuple[int, int], list[tuple[int, int, int]]] = {}  # (owner, row) -> selections
    for source, token in case.tokens():
        for slot, expert in enumerate(case.topk_idx[source][token]):
            row = int(received[source].handle.send_row[token, slot])
            assert (row == -1) == (expert == -1)
            if expert >= 0:
                owner = case.owner[expert]
                assert torch.equal(flat_x(received[owner])[row], x[source][token])
                seen.setdefault((owner, row), []).append((source, token, slot))
    for (_, row), selections in seen.items():
        assert row >= 0
        assert len({selection[:2] for selection in selections}) == 1
        assert layout == "compact" or len(selections) == 1
    for rank, recv in enumerate(received):
        num_recv = int(recv.num_recv)
        sources = recv.handle.recv_src.tolist()
        assert sources[:num_recv] == [list(src) for src in case.compact(rank)]
        assert all(src == [-1, -1] for src in sources[num_recv:])
        for (source, token), rows in zip(sources[:num_recv], recv.handle.recv_row, strict=False):
            send_row = received[source].handle.send_row[token].tolist()
            chosen = case.topk_idx[source][token]
            here = [expert >= 0 and case.owner[expert] == rank for expert in chosen]
            assert rows.tolist() == [r if h else -1 for r, h in zip(send_row, here, strict=True)]
        sent_to = [
            sum(source == rank for source, _ in case.compact(owner))
            for owner in range(case.num_ranks)
        ]
        got_from = [
            sum(source == other for source, _ in case.compact(rank))
            for other in range(case.num_ranks)
        ]
        assert recv.handle.rank_counts.tolist() == [sent_to, got_from]


# ---- Sums ----


def expected_sum(
    case: Case, source: int, token: int, value: Any, *, per_rank: bool, start: Tensor
) -> Tensor:
    """Add value(owner, slot), fp32 [H], in ascending (owner rank, slot) order, one by one."""
    chosen = case.topk_idx[source][token]
    steps = sorted((case.owner[e], slot) for slot, e in enumerate(chosen) if e >= 0)
    total, done = start, set()
    for owner, slot in steps:
        if per_rank and owner in done:
            continue
        done.add(owner)
        total = total + value(owner, slot)
    return total


@bounded
@given(
    cases(),
    st.sampled_from(LAYOUTS),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.sampled_from([0, 1, 2]),
    st.integers(0, 99),
)
def test_combine_of_identity_experts_sums_in_the_stated_order(
    case: Case, layout: str, dtype: torch.dtype, num_bias: int, seed: int
) -> None:
    x = case.random(HIDDEN, seed=seed, dtype=dtype)
    bias0 = case.random(HIDDEN, seed=seed + 1, dtype=dtype)
    bias1 = case.random(HIDDEN, seed=seed + 2, dtype=dtype)
    bias: Any = [None, bias0, list(zip(bias0, bias1, strict=True))][num_bias]
    received = dispatch(case, layout, x=x)
    # Not quite identity: a rank scales its rows by a power of two, so that ranks differ.
    y = [recv.x * 2.0**rank for rank, recv in enumerate(received)]
    out = reference.combine(y, handles(received), bias=bias, expert_map=case.expert_map)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    for source, token in case.tokens():
        row = x[source][token].to(accumulate)
        start = torch.zeros(HIDDEN, dtype=accumulate)
        if num_bias:
            start = bias0[source][token].to(accumulate)
        if num_bias == 2:
            start = start + bias1[source][token].to(accumulate)

        def scaled(owner: int, slot: int, row: Tensor = row) -> Tensor:
            return (row * 2.0**owner).to(dtype).to(accumulate)

        want = expected_sum(
            case, source, token, scaled, per_rank=layout == "compact", start=start
        ).to(dtype)
        assert torch.equal(out[source][token], want)
        assert out[source].dtype == dtype


@bounded
@given(
    cases(),
    st.sampled_from(["grouped", "slab"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    st.integers(0, 99),
)
def test_combine_weighted_of_identity_experts_is_the_weighted_sum(
    case: Case, layout: str, dtype: torch.dtype, sync: bool, seed: int
) -> None:
    x = case.random(HIDDEN, seed=seed, dtype=dtype)
    weights = case.random(case.num_topk, seed=seed + 1, dtype=torch.float32)
    received = dispatch(
        case, layout, x=x, topk_weights=weights, sync=sync, capacity=roomy(case, layout)
    )
    y = [recv.x for recv in received]
    out = reference.combine(y, handles(received), weighted=True, expert_map=case.expert_map)
    for source, token in case.tokens():
        row = x[source][token].float()

        def product(owner: int, slot: int, row: Tensor = row, at: Any = (source, token)) -> Tensor:
            scaled: Tensor = row * weights[at[0]][at[1], slot]
            return scaled

        start = torch.zeros(HIDDEN)
        want = expected_sum(case, source, token, product, per_rank=False, start=start).to(dtype)
        assert torch.equal(out[source][token], want)


@bounded
@given(cases(), st.sampled_from(LAYOUTS))
def test_combine_topk_weights_come_home_to_their_slots(case: Case, layout: str) -> None:
    received = dispatch(case, layout)
    held = [present(r.topk_weights) for r in received]
    both = reference.combine(
        [r.x for r in received], handles(received), topk_weights=held, expert_map=case.expert_map
    )
    for (_, home), ids, weights in zip(both, case.ids(), case.tagged_weights(), strict=True):
        assert torch.equal(home, torch.where(ids >= 0, weights, 0))


# ---- Modes that must agree ----


def roomy(case: Case, layout: str) -> int | None:
    """A capacity that static grouped and slab need where duplicates exceed the default one."""
    if layout == "compact":
        return None
    return (case.num_ranks * case.max_tokens * case.num_topk + case.num_experts * 4) // 4 * 4 + 4


@bounded
@given(cases(), st.sampled_from(LAYOUTS), st.booleans(), st.integers(0, 99))
def test_cached_dispatch_equals_a_fresh_one(case: Case, layout: str, sync: bool, seed: int) -> None:
    capacity = roomy(case, layout)
    first = dispatch(case, layout, sync=sync, capacity=capacity)
    x = case.random(HIDDEN, seed=seed, dtype=torch.float32)
    weights = case.random(case.num_topk, seed=seed + 1, dtype=torch.float32)
    fresh = dispatch(case, layout, x=x, topk_weights=weights, sync=sync, capacity=capacity)
    rebuilt = [tuple(t.clone() for t in handle) for handle in handles(first)]
    cached = reference.dispatch(x, None, weights, handles=rebuilt, **case.options)
    for a, b in zip(fresh, cached, strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(present(a.topk_weights), present(b.topk_weights))
        assert torch.equal(a.num_tokens_per_expert, b.num_tokens_per_expert)
        assert a.num_recv == b.num_recv
        assert b.topk_idx is None
        assert all(torch.equal(s, t) for s, t in zip(a.handle, b.handle, strict=True))
        if layout == "grouped":
            assert torch.equal(present(a.offsets), present(b.offsets))


@bounded
@given(cases(), st.sampled_from(LAYOUTS))
def test_static_mode_equals_sync_mode_on_the_real_rows(case: Case, layout: str) -> None:
    capacity = roomy(case, layout)
    row_index = layout == "compact" and not has_duplicates(case)
    sync = dispatch(case, layout, capacity=capacity, row_index=row_index)
    static = dispatch(case, layout, capacity=capacity, row_index=row_index, sync=False)
    for a, b in zip(sync, static, strict=True):
        assert b.status.tolist() == [0]
        assert present_tensor(b.num_recv).tolist() == [a.num_recv]
        assert torch.equal(a.num_tokens_per_expert, b.num_tokens_per_expert)
        for name, padding in (
            ("x", None),
            ("topk_idx", -1),
            ("topk_weights", 0),
            ("row_index", -1),
        ):
            want, got = getattr(a, name), getattr(b, name)
            if want is None:
                assert got is None
                continue
            n = want.shape[0]
            assert got.shape[0] >= n
            assert torch.equal(got[:n], want)
            assert padding is None or got[n:].eq(padding).all()
        assert torch.equal(a.handle.send_row, b.handle.send_row)
        assert torch.equal(a.handle.rank_counts, b.handle.rank_counts)
        if a.offsets is not None:
            assert torch.equal(a.offsets, present(b.offsets))


@bounded
@given(cases())
def test_static_default_sizes_hold_every_routing_without_duplicates(case: Case) -> None:
    if has_duplicates(case):
        return
    for layout in LAYOUTS:
        for recv in dispatch(case, layout, sync=False, row_index=layout == "compact"):
            assert recv.status.tolist() == [0]
        worst = case.num_ranks * case.max_tokens
        slab = reference.dispatch(
            case.tagged_x(), case.ids(), layout="slab", sync=False, **case.options
        )
        assert all(recv.x.shape[1] == worst for recv in slab)
        assert all(recv.status.tolist() == [0] for recv in slab)


def has_duplicates(case: Case) -> bool:
    rows = [[e for e in row if e >= 0] for rows in case.topk_idx for row in rows]
    return any(len(set(row)) < len(row) for row in rows)


def present_tensor(value: int | Tensor) -> Tensor:
    assert isinstance(value, Tensor)
    return value


@bounded
@given(cases(), st.sampled_from(LAYOUTS))
def test_capacity_exactly_met_fits_and_one_less_raises_e230_everywhere(
    case: Case, layout: str
) -> None:
    ranks = range(case.num_ranks)
    needed = {
        "compact": max(len(case.compact(rank)) for rank in ranks),
        "grouped": max(len(case.grouped(rank)) for rank in ranks),
        "slab": case.fullest_expert(),
    }[layout]
    options = {**case.options, "layout": layout, "alignment": case.alignment}
    for sync in (True, False):
        received = reference.dispatch(
            case.tagged_x(), case.ids(), capacity=needed, sync=sync, **options
        )
        assert all(recv.status.tolist() == [0] for recv in received)
    if needed == 0:
        return
    with pytest.raises(EPError) as caught:
        reference.dispatch(case.tagged_x(), case.ids(), capacity=needed - 1, **options)
    assert caught.value.code == "E230"
    failed = reference.dispatch(
        case.tagged_x(), case.ids(), capacity=needed - 1, sync=False, **options
    )
    for recv in failed:
        assert recv.status.tolist() == [230]
        assert present_tensor(recv.num_recv).tolist() == [0]
        assert recv.num_tokens_per_expert.eq(0).all()
        assert present(recv.topk_idx).eq(-1).all()


@bounded
@given(cases(), st.data())
def test_one_bad_id_anywhere_fails_all_ranks_with_e213(case: Case, data: st.DataObject) -> None:
    places = [(s, t, k) for s, t in case.tokens() for k in range(case.num_topk)]
    if not places:
        return
    source, token, slot = data.draw(st.sampled_from(places))
    ids = case.ids()
    ids[source][token, slot] = data.draw(st.sampled_from([-2, case.num_experts]))
    with pytest.raises(EPError) as caught:
        reference.dispatch(case.tagged_x(), ids, **case.options)
    assert caught.value.code == "E213"
    assert caught.value.peer == source
    failed = reference.dispatch(case.tagged_x(), ids, sync=False, **case.options)
    assert all(recv.status.tolist() == [213] for recv in failed)
    assert all(recv.counts == [0] * len(recv.counts) for recv in failed)


@bounded
@given(st.integers(1, 12), st.integers(1, 40))
def test_default_experts_are_contiguous_blocks_that_differ_by_at_most_one(
    num_ranks: int, num_experts: int
) -> None:
    experts = reference.expert_owner(num_experts, num_ranks)
    owner = experts.owner.tolist()
    assert owner == sorted(owner)
    assert experts.num_local == [owner.count(rank) for rank in range(num_ranks)]
    assert max(experts.num_local) - min(experts.num_local) <= 1
    assert experts.num_local == sorted(experts.num_local, reverse=True)
    for expert, local in enumerate(experts.local_id.tolist()):
        assert local == expert - owner.index(owner[expert])


# ---- Gradients ----


@few
@given(cases(), st.sampled_from(LAYOUTS), st.integers(0, 99))
def test_dispatch_and_combine_pass_gradcheck(case: Case, layout: str, seed: int) -> None:
    num_tokens = [len(rows) for rows in case.topk_idx]
    if sum(num_tokens) == 0:
        return
    all_x = torch.cat(case.random(2, seed=seed, dtype=torch.float64)).requires_grad_()
    all_weights = torch.cat(case.random(case.num_topk, seed=seed + 1, dtype=torch.float64))

    def layer(all_x: Tensor, all_weights: Tensor) -> Tensor:
        x = list(torch.split(all_x, num_tokens))
        weights = list(torch.split(all_weights, num_tokens))
        received = dispatch(case, layout, x=x, topk_weights=weights)
        gates = [present(r.topk_weights) for r in received]
        out = reference.combine(
            [recv.x * recv.x for recv in received],
            handles(received),
            weighted=layout != "compact",
            topk_weights=[gate * gate for gate in gates],
            bias=[(rows, None) for rows in x],
            expert_map=case.expert_map,
        )
        results = [*[t for pair in out for t in pair], *[r.x for r in received], *gates]
        return torch.cat([t.flatten() for t in results])

    all_weights.requires_grad_()
    assert torch.autograd.gradcheck(layer, (all_x, all_weights), fast_mode=True)


@few
@given(cases(), st.sampled_from(LAYOUTS), st.integers(0, 99))
def test_gradient_of_dispatch_is_combine(case: Case, layout: str, seed: int) -> None:
    x = [t.requires_grad_() for t in case.random(HIDDEN, seed=seed, dtype=torch.float64)]
    received = dispatch(case, layout, x=x)
    grads = [torch.randn_like(recv.x) for recv in received]
    loss = sum((r.x * g).sum() for r, g in zip(received, grads, strict=True))
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return  # no token went anywhere
    got = torch.autograd.grad(loss, x, allow_unused=True, materialize_grads=True)
    want = reference.combine(grads, handles(received), expert_map=case.expert_map)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
