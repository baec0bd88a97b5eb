"""`ep_comm.plan`: visits against formulas and brute force, bytes against a walk over tokens, times
against what two GPUs did.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ep_comm import _core
from ep_comm.cli.app import app
from ep_comm.errors import EPError
from ep_comm.plan import PRESETS, Deployment, Hardware, Visits, curve, predict, visits
from ep_comm.plan.model import _bytes
from ep_comm.plan.visits import _drawn_alike

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
# The commit whose records gave Hardware its overheads: calibrate anew before naming another.
CALIBRATED = "9377d92"
# That of calls of 8192 tokens, whose kernels are the same.
CALIBRATED_8192 = "3ed1c99"
GRAPHED = " in a graph"

SMALL = Deployment(
    num_nodes=2, ranks_per_node=2, num_tokens=64, hidden=256, num_experts=8, num_topk=2
)


# ---- where tokens go ----


def test_exact_visits_equal_those_of_all_choices() -> None:
    """Six experts on three nodes of one rank, two per token: all 15 choices are as likely."""
    d = replace(SMALL, num_nodes=3, ranks_per_node=1, num_experts=6, num_tokens=15)
    hits: Counter[int] = Counter()
    for choice in itertools.combinations(range(6), 2):
        hits.update({expert // 2 for expert in choice})

    v = visits(d)

    assert v.drawn == 0
    assert v.ranks[0].tolist() == pytest.approx([hits[r] for r in range(3)])
    assert torch.equal(v.ranks, v.nodes)
    assert v.selections[0].tolist() == pytest.approx([10, 10, 10])
    assert v.remote_nodes_per_token == pytest.approx(v.nodes_per_token * 2 / 3)


def test_drawn_visits_agree_with_the_formula() -> None:
    d = PRESETS["node"]
    drawn, exact = _drawn_alike(d, 1), visits(d)
    assert drawn.drawn == 32768
    # Six standard deviations of a mean over as many tokens.
    assert drawn.ranks_per_token == pytest.approx(exact.ranks_per_token, rel=0.01)
    torch.testing.assert_close(drawn.ranks, exact.ranks, rtol=0.03, atol=0.0)


def test_node_limited_routing_visits_at_most_so_many_nodes() -> None:
    d = replace(PRESETS["prefill"], num_nodes=8, num_slots=None, num_groups=8, top_groups=4)
    limited, free = visits(d), visits(replace(d, top_groups=None))
    assert limited.nodes_per_token <= 4
    assert limited.nodes_per_token > 3.4  # eight experts of four nodes miss one seldom
    assert free.nodes_per_token == pytest.approx(8 * (1 - _missed(256, 32, 8)))


def _missed(experts: int, on_node: int, topk: int) -> float:
    """Chance that a token chooses none of a node's experts."""
    chance = 1.0
    for k in range(topk):
        chance *= (experts - on_node - k) / (experts - k)
    return chance


def test_skew_loads_ranks_and_replicas_even_it_out() -> None:
    skewed = replace(PRESETS["prefill"], zipf=0.8, num_slots=None)
    worse, better = visits(skewed), visits(replace(skewed, num_slots=288))
    assert worse.imbalance > 1.5
    assert better.imbalance < 1.3  # one redundant expert a rank: the hottest remain hotter


def test_shared_expert_of_decode_is_spread_over_the_redundant_ranks() -> None:
    v = visits(PRESETS["decode"])
    assert v.ranks_per_token == pytest.approx(9.0)  # one expert a rank: every selection is a visit
    assert float(v.selections.sum()) == pytest.approx(320 * 28 * 9)
    assert v.imbalance < 1.5


def test_equal_seeds_give_equal_visits_and_others_do_not() -> None:
    d = replace(SMALL, zipf=1.0)
    assert torch.equal(visits(d, seed=3).ranks, visits(d, seed=3).ranks)
    assert not torch.equal(visits(d, seed=3).ranks, visits(d, seed=4).ranks)


# ---- bytes ----


def walk(d: Deployment, ids: torch.Tensor) -> tuple[Visits, dict[str, Counter[int]]]:
    """Every token of every rank, one by one: what crosses which link in dispatch and combine.

    ids: [R, T, K]. Kernels of large batches.
    """
    per_rank = d.num_experts // d.num_ranks
    v = Visits(
        d.num_tokens,
        torch.zeros(d.num_ranks, d.num_ranks, dtype=torch.float64),
        torch.zeros(d.num_ranks, d.num_nodes, dtype=torch.float64),
        torch.zeros(d.num_ranks, d.num_ranks, dtype=torch.float64),
        0,
    )
    names = ("nvlink_out", "nvlink_in", "nic_out", "nic_in", "stored")
    moved: dict[str, Counter[int]] = {f"{op} {n}": Counter() for op in "dc" for n in names}
    row, y = d.payload_bytes(), d.y_bytes
    record = d.rail_head_bytes() + d.row_bytes
    for src, token in itertools.product(range(d.num_ranks), range(d.num_tokens)):
        node, local = divmod(src, d.ranks_per_node)
        ranks = {int(e) // per_rank for e in ids[src, token]}
        moved["c stored"][src] += y
        for e in ids[src, token]:
            v.selections[src, int(e) // per_rank] += 1
        for to in {r // d.ranks_per_node for r in ranks}:
            v.nodes[src, to] += 1
            relay = to * d.ranks_per_node + local
            if to != node:
                moved["d nic_out"][src] += record
                moved["d nic_in"][relay] += record
                moved["d stored"][src] += record
                moved["c nic_out"][relay] += d.partial_bytes
                moved["c nic_in"][src] += d.partial_bytes
                moved["c stored"][relay] += d.partial_bytes
            for r in (r for r in ranks if r // d.ranks_per_node == to):
                v.ranks[src, r] += 1
                if r == relay:
                    moved["d stored"][relay] += row
                    continue
                moved["d nvlink_out"][relay] += row
                moved["d nvlink_in"][r] += row
                moved["c nvlink_out"][r] += y
                moved["c nvlink_in"][relay] += y
    return v, moved


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 4), (2, 2), (4, 1), (3, 2)])
@pytest.mark.parametrize("partials", ["bf16", "fp32"])
def test_bytes_of_every_link_are_those_of_a_walk_over_tokens(
    nodes: int, per_node: int, partials: Any
) -> None:
    d = replace(
        SMALL, num_nodes=nodes, ranks_per_node=per_node, num_experts=12, num_topk=3,
        partials=partials, num_tokens=1025 if nodes == 1 else 64,
    )  # fmt: skip
    scores = torch.rand(
        (d.num_ranks, d.num_tokens, d.num_experts), generator=torch.Generator().manual_seed(5)
    )
    v, moved = walk(d, scores.topk(3, 2).indices)

    for letter, op in (("d", "dispatch"), ("c", "combine")):
        said = _bytes(op, d, v)
        for name in ("nvlink_out", "nvlink_in", "nic_out", "nic_in", "stored"):
            want = [moved[f"{letter} {name}"][r] for r in range(d.num_ranks)]
            assert getattr(said, name).tolist() == pytest.approx(want), f"{op} {name}"


@pytest.mark.parametrize("layout", ["compact", "slab"])
def test_bytes_of_small_batches_are_those_of_a_walk_over_tokens(layout: Any) -> None:
    """On a link once for each (token, rank); SMs besides write lines, read them, and make rows."""
    d = replace(SMALL, num_nodes=1, ranks_per_node=4, num_experts=12, num_topk=3, layout=layout)
    scores = torch.rand((4, 64, 12), generator=torch.Generator().manual_seed(5))
    ids = scores.topk(3, 2).indices
    v, moved = walk(d, ids)
    is_slab = layout == "slab"
    row, record, back = d.row_bytes, d.payload_bytes() * 8 / 7, d.y_bytes * 8 / 7
    did: Counter[tuple[str, int]] = Counter()  # loads and stores by (operation, rank)
    for src, token in itertools.product(range(4), range(64)):
        did["dispatch", src] += 2 * d.hidden if is_slab else row
        did["combine", src] += d.y_bytes
        dst = [int(e) // 3 for e in ids[src, token]]
        for r in set(dst):
            rows = dst.count(r) if is_slab else 1
            did["dispatch", src] += record
            did["dispatch", r] += record + rows * row
            did["combine", r] += rows * d.y_bytes + back
            did["combine", src] += back

    for letter, op in (("d", "dispatch"), ("c", "combine")):
        said = _bytes(op, d, v)
        for name in ("nvlink_out", "nvlink_in"):
            want = [moved[f"{letter} {name}"][r] for r in range(4)]
            assert getattr(said, name).tolist() == pytest.approx(want), f"{op} {name}"
        total = said.pushed + said.stored + said.loaded
        assert total.tolist() == pytest.approx([did[op, r] for r in range(4)]), op


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("op", ["dispatch", "dispatch_cached", "combine"])
def test_what_leaves_a_link_arrives_somewhere(name: str, op: str) -> None:
    d = PRESETS[name]
    moved = _bytes(op, d, visits(d))
    for kind in ("nvlink", "nic"):
        out, into = getattr(moved, f"{kind}_out"), getattr(moved, f"{kind}_in")
        assert float(out.sum()) == pytest.approx(float(into.sum()))


# ---- times ----


def test_wire_floors_of_eight_ranks_are_those_published() -> None:
    """7168, top-8 of 256, 4096 tokens on 8 ranks at 370 GB/s: FP8 dispatch 380 µs, combine 735 µs.

    The floors count rows and scales, not our 80 bytes of metadata: within 2 %.
    """
    told = predict(PRESETS["node"], Hardware(nvlink_pull_gbps=370.0))
    assert told.dispatch.resource_us["NVLink in"] == pytest.approx(380, rel=0.02)
    assert told.combine.resource_us["NVLink in"] == pytest.approx(735, rel=0.02)
    # What another library was measured to take there, 20 SMs: nobody is below the floor.
    assert told.dispatch.time_us < 494
    assert told.combine.time_us < 996


# Bare data phases on two H200, before the kernels of today: rows known beforehand, no counts, no
# flags, µs by SMs.
PUSH_BF16 = {8: 297, 10: 241, 12: 204, 14: 178}
PUSH_FP8 = {8: 158, 10: 128, 12: 109, 14: 97}
PULL_BF16 = {20: 186, 32: 187, 64: 190}


@pytest.mark.parametrize(
    ("op", "dtype", "measured"),
    [
        ("dispatch", "bf16", PUSH_BF16),
        ("dispatch", "fp8", PUSH_FP8),
        ("combine", "bf16", PULL_BF16),
    ],
    ids=["push-bf16", "push-fp8", "pull-bf16"],
)
def test_data_phase_is_that_of_bare_copies(op: str, dtype: Any, measured: dict[int, int]) -> None:
    """Pushes of FP8 up to 11 % low, of BF16 up to 6 %, pulls up to 4 %; none high.

    The rate of an SM is that of whole calls: with 46 GB/s, not 50, these would be within 7 %, but
    whole calls within 7 % instead of 4 %. Left out, as no rate describes it: more than 14 SMs,
    where stores of both directions got in each other's way (178 µs became up to 208).
    """
    most = {("dispatch", "fp8"): 0.11, ("dispatch", "bf16"): 0.06}.get((op, dtype), 0.04)
    d = Deployment(1, 2, x_dtype=dtype)
    for sms, us in measured.items():
        told = getattr(predict(d, num_sms=sms), op)
        assert (1 - most) * us < max(told.resource_us.values()) < us, sms


def records(name: str, commit: str = CALIBRATED) -> list[dict[str, Any]]:
    """Those of whole calls that the model knows, of this commit."""
    lines = [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]
    found = [
        r
        for r in lines
        if r["commit"] == commit
        and r["op"].removesuffix(GRAPHED) in ("dispatch", "dispatch_cached", "combine")
    ]
    assert found, f"no records of {commit} in {name}: calibrate Hardware anew"
    return found


def predicted(record: dict[str, Any], **cluster: Any) -> float:
    """µs; `cluster` are fields of the deployment that a record does not name."""
    case = record["case"].split("-")
    d = replace(
        Deployment(**({"num_nodes": 1, "ranks_per_node": 2} | cluster)),
        num_tokens=int(case[1].removeprefix("t")),
        layout="slab" if "slab" in case else "compact",
        x_dtype="fp8" if "fp8" in case else "bf16",
        sync="static" not in case,
    )
    sms = record["sms"] or None  # 0: all that the library takes for a small batch
    told = getattr(predict(d, num_sms=sms), record["op"].removesuffix(GRAPHED))
    assert told.is_small == ("static" in case), record
    assert told.link_bytes["nvlink_in"] == pytest.approx(record["scaleup_recv_bytes"], rel=0.006)
    return float(told.time_us)


def errors(found: list[dict[str, Any]], **cluster: Any) -> list[float]:
    """Of predictions, in percent of what was measured: positive where these are longer."""
    return [100 * (predicted(r, **cluster) / r["time_us"]["p50"] - 1) for r in found]


def test_large_calls_take_what_two_gpus_measured() -> None:
    """4096 tokens, BF16 and FP8, 8 to 24 SMs, and 8192 tokens, BF16, 14 and 16 SMs: within 4 %.

    The overheads were fitted to these, one number for an operation, the rate of an SM that pushes
    to the same calls at 803f363; the links' rates were not.
    """
    longest = [r for r in records("nvlink_gpus", CALIBRATED_8192) if "-t8192-" in r["case"]]
    off = errors(longest + [r for r in records("nvlink_gpus") if "-static" not in r["case"]])
    assert len(off) == 37
    assert -4 < min(off) < -3 < 3 < max(off) < 4


def test_small_batches_take_what_two_gpus_measured() -> None:
    """In a CUDA graph, 1 to 1024 tokens, all SMs, and 128 tokens, 16 to 64 SMs: within 7.3 %.

    Half of them within 4 %. Four numbers were fitted to these, two are differences of them, and one
    is nominal. Furthest off: a compact dispatch of 512 tokens (7 % high), one of 64 into slabs, and
    combines of slabs of 512 and more (6 to 7 % low).
    """
    off = errors(small_batches())
    assert len(off) == 38
    assert -7.3 < min(off) < -6.5 < 6.5 < max(off) < 7.3
    assert sorted(map(abs, off))[len(off) // 2] < 4


def small_batches() -> list[dict[str, Any]]:
    """Records of them in a graph: by tokens on all SMs, and of 128 tokens by SMs."""
    found = records("nvlink_latency") + [r for r in records("nvlink_gpus") if r["sms"] != 0]
    return [r for r in found if "-static" in r["case"] and r["op"].endswith(GRAPHED)]


def test_what_slabs_and_given_sms_add_is_the_difference_of_records() -> None:
    """The two numbers of small batches that are not fitted, to a tenth of a microsecond.

    Slabs against compact rows, 1 to 16 tokens: before bytes count. Where SMs are given kernels do
    not start beside those ahead, so a graph saves less against calls one by one, with 128 tokens.
    """
    found = records("nvlink_latency") + records("nvlink_gpus")
    measured = {(r["case"], r["op"], r["sms"]): float(r["time_us"]["p50"]) for r in found}

    def us(tokens: int, op: str, sms: int = 0, kind: str = "bf16") -> float:
        return measured[f"ep2-t{tokens}-h7168-top8of256-{kind}-static", op, sms]

    ops = ("dispatch", "combine")
    more = [
        us(n, op + GRAPHED, kind="bf16-fp8-slab") - us(n, op + GRAPHED)
        for n, op in itertools.product((1, 4, 16), ops)
    ]
    assert Hardware().small_slab_us == pytest.approx(sum(more) / len(more), abs=0.1)

    def saved(op: str, sms: int) -> float:
        return us(128, op, sms) - us(128, op + GRAPHED, sms)

    lost = [saved(op, 0) - saved(op, sms) for op, sms in itertools.product(ops, (16, 32, 64))]
    assert Hardware().small_start_us == pytest.approx(sum(lost) / len(lost), abs=0.1)


def test_small_batches_that_nothing_was_fitted_to_take_what_was_measured() -> None:
    """Slabs of 1, 32 and 128 tokens in a graph, from another bench: within 9 %.

    A weak check: of 1 and 128 tokens the fit has seen records, and only 32 is new to it.
    """
    off = errors([r for r in records("nvlink_decode") if r["op"].endswith(GRAPHED)])
    assert len(off) == 6
    assert -9 < min(off) < 0 < max(off) < 5


def test_small_batches_called_one_by_one_take_some_microseconds_more() -> None:
    """2 to 13 µs, not modelled: the host's part, and that no kernel ahead hides the start."""
    found = records("nvlink_latency") + records("nvlink_gpus") + records("nvlink_decode")
    alone = [r for r in found if "-static" in r["case"] and not r["op"].endswith(GRAPHED)]
    more = [r["time_us"]["p50"] - predicted(r) for r in alone]
    assert len(more) == 44
    assert 2 < min(more) < max(more) < 13


def test_two_gpus_as_two_nodes_take_longer_than_predicted() -> None:
    """4096 tokens, BF16, over NVSHMEM, 8 to 20 SMs: 9 to 25 % low, so a bound and no prediction.

    Dispatch 9 to 22 %, combine 18 to 25 %, the more the more SMs. The bytes are right, so what is
    missing is time that kernels across nodes spend otherwise.
    """
    cluster = {"num_nodes": 2, "ranks_per_node": 1, "rail": "nvlink"}
    found = records("hybrid_gpus")
    off = errors(found, **cluster)
    assert len(off) == 8
    assert -25 < min(off) < -24
    assert -10 < max(off) < -9


@pytest.mark.parametrize("name", PRESETS)
def test_needed_sms_are_the_fewest_that_do_not_bound(name: str) -> None:
    told = predict(PRESETS[name])
    for op in (told.dispatch, told.combine):
        assert op.sms == (Hardware().num_sms if op.is_small else op.sms_needed)
        assert op.bound != "SMs"
        if op.sms_needed > 1:
            fewer = predict(PRESETS[name], num_sms=op.sms_needed - 1)
            assert getattr(fewer, op.op).bound == "SMs"


@pytest.mark.parametrize(
    ("change", "dispatch", "combine"),
    [
        ({}, True, True),
        ({"num_tokens": 1024}, True, True),
        ({"num_tokens": 1025}, False, False),
        ({"layout": "slab"}, True, True),
        ({"layout": "grouped"}, False, True),
        ({"sync": True}, False, True),
        ({"sync": True, "layout": "slab"}, True, True),
        ({"ranks_per_node": 72, "num_experts": 144}, False, False),
        ({"ranks_per_node": 16, "num_tokens": 1024}, False, False),  # no room for the places
        ({"num_nodes": 2}, False, False),
        ({"num_nodes": 2, "mode": "direct"}, True, True),
    ],
)
def test_calls_are_small_batches_as_the_contract_has_it(
    change: dict[str, Any], dispatch: bool, combine: bool
) -> None:
    d = replace(PRESETS["node"], **({"num_tokens": 128} | change))
    assert (d.is_small("dispatch"), d.is_small("combine")) == (dispatch, combine)
    if d.num_nodes == 1:
        assert not d.is_small("dispatch_cached")


def test_small_batch_takes_links_sms_and_memory_one_after_the_other_and_a_row_at_least() -> None:
    hw = Hardware()
    d = replace(PRESETS["node"], num_tokens=128)
    told = predict(d).dispatch
    parts = sum(told.resource_us[name] for name in ("NVLink in", "SMs", "memory"))
    assert told.time_us == pytest.approx(hw.small_dispatch_overhead_us + parts)
    one = predict(replace(d, num_tokens=1)).combine
    assert one.bound == "one row"
    assert one.time_us == pytest.approx(hw.small_combine_overhead_us + hw.small_row_us)


def test_small_batch_starts_later_where_sms_are_given_and_takes_more_in_slabs() -> None:
    hw = Hardware()
    one = replace(PRESETS["node"], num_tokens=1)
    free, given = (predict(one, num_sms=sms) for sms in (None, hw.num_sms))
    slab = predict(replace(one, layout="slab"))
    for op in ("dispatch", "combine"):
        us = getattr(free, op).time_us
        assert getattr(given, op).time_us == pytest.approx(us + hw.small_start_us)
        assert getattr(slab, op).time_us == pytest.approx(us + hw.small_slab_us)
    large = predict(PRESETS["node"], num_sms=24).dispatch  # starts no sooner in either case
    assert large.overhead_us == hw.dispatch_overhead_us


def test_all_sms_together_store_no_faster_than_memory_takes_it() -> None:
    """A small batch gains little from SMs once what it stores takes longer than SMs do."""
    d = Deployment(1, 2, num_tokens=1024, layout="slab")
    hw = Hardware(num_sms=10_000)
    told = predict(d, hw).dispatch
    floor = told.overhead_us + told.resource_us["NVLink in"] + told.resource_us["memory"]
    assert told.resource_us["memory"] > 10 * told.resource_us["SMs"]
    assert floor < told.time_us < 1.02 * floor


def test_two_gpus_as_two_nodes_can_reach_what_is_asked_of_them() -> None:
    """150 GB/s per rank over a rail of NVLink with 20 SMs, 60 with 8."""
    for sms, gbps in ((20, 150), (8, 60)):
        told = predict(PRESETS["two-gpus"], num_sms=sms)
        assert told.dispatch.scaleup_gbps > gbps
        assert told.combine.scaleup_gbps > gbps
        assert told.dispatch.link_bytes["nic_in"] == 0


def test_slower_nic_takes_longer_and_bounds() -> None:
    d = PRESETS["prefill"]
    routing = visits(d)
    slow, fast = (predict(d, Hardware(nic_gbps=rate), routing=routing) for rate in (25.0, 100.0))
    assert slow.combine.bound in ("NIC in", "NIC out")
    assert slow.combine.time_us > 1.9 * fast.combine.time_us
    assert slow.combine.sms_needed < fast.combine.sms_needed


def test_fp32_partials_double_what_crosses_on_the_way_back() -> None:
    d = PRESETS["prefill"]
    routing = visits(d)
    half, full = (predict(replace(d, partials=p), routing=routing) for p in ("bf16", "fp32"))
    assert full.combine.link_bytes["nic_in"] == 2 * half.combine.link_bytes["nic_in"]
    assert full.combine.link_bytes["nvlink_in"] == half.combine.link_bytes["nvlink_in"]


# ---- memory ----


@pytest.mark.parametrize("nodes", [2, 4, 40, 128])
@pytest.mark.parametrize("tokens", [1, 4096, 65536])
def test_staging_keeps_to_128_mib_whatever_nodes_and_batch(nodes: int, tokens: int) -> None:
    d = replace(PRESETS["prefill"], num_nodes=nodes, num_slots=None, num_tokens=tokens,
                num_experts=8 * nodes, num_groups=1, top_groups=None)  # fmt: skip
    sizes = predict(d, routing=visits(replace(d, num_tokens=1))).memory
    assert 0 < sizes.staging_bytes <= 128 << 20
    assert sizes.staging_bytes == (
        2 * (nodes - 1) * sizes.num_channels * sizes.ring_chunks * sizes.chunk_bytes
    )


def test_one_node_needs_no_rails() -> None:
    sizes = predict(PRESETS["node"]).memory
    assert (sizes.staging_bytes, sizes.mailbox_bytes, sizes.direct_bytes) == (0, 0, 0)
    shape = _core.Shape()
    shape.num_ranks, shape.num_experts, shape.max_local_experts = 8, 256, 32
    shape.num_topk, shape.max_tokens = 8, 4096
    assert sizes.control_bytes == _core.ControlLayout(shape).end


def test_one_node_has_places_for_small_batches() -> None:
    few, many = (
        predict(replace(PRESETS["node"], num_tokens=n)).memory.control_bytes for n in (128, 2048)
    )
    record = 128 * (1 + 8 * 16)  # 13 words about it, 7168 BF16 elements in pieces of 16 lines
    assert few - many == 2 * 8 * 128 * record
    assert few < 320 << 20


def test_direct_mode_has_slots_for_every_source_instead_of_rings() -> None:
    sizes = predict(PRESETS["decode"]).memory
    assert sizes.staging_bytes == 0
    assert sizes.direct_bytes > 2 * 320 * 28 * 7168


# ---- arguments, command ----


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_nodes": 0}, "num_nodes=0"),
        ({"num_nodes": 600}, "at most 1024 ranks"),
        ({"num_topk": 33, "num_experts": 64}, "at most 32"),
        ({"num_groups": 3}, "divisor of 8"),
        ({"num_groups": 4, "top_groups": 5}, "at most num_groups=4"),
        ({"num_groups": 8, "top_groups": 1}, "num_topk=2"),
        ({"num_slots": 7}, "one for each of 8"),
        ({"num_slots": 9}, "multiple of 4 ranks"),
        ({"x_dtype": "int4"}, "'bf16' or 'fp8'"),
        ({"hidden": 100}, "multiple of 128"),
        ({"zipf": -1.0}, "zipf"),
        ({"sync": "no"}, "False or True"),
    ],
)
def test_impossible_deployment_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(EPError, match="E203") as caught:
        replace(SMALL, **change)
    assert words in str(caught.value)


@pytest.mark.parametrize("change", [{"nic_gbps": 0.0}, {"flag_us": -1.0}, {"num_sms": 0}])
def test_impossible_hardware_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(EPError, match=f"E203.*{next(iter(change))}"):
        Hardware(**change)


def test_command_prints_tables_json_and_a_picture(tmp_path: Path) -> None:
    run = CliRunner().invoke
    options = ["plan", "--preset", "node", "--nodes", "2", "--ranks-per-node", "2",
               "--tokens", "128", "--experts", "16", "--topk", "4"]  # fmt: skip

    said = run(app, [*options, "--nic-gbps", "25", "--sms", "20", "--json"])
    assert said.exit_code == 0, said.output
    numbers = json.loads(said.stdout)
    assert numbers["deployment"]["num_nodes"] == 2
    assert numbers["hardware"]["nic_gbps"] == 25.0
    assert numbers["dispatch"]["sms"] == 20
    want = predict(
        Deployment(2, 2, num_tokens=128, num_experts=16, num_topk=4), Hardware(nic_gbps=25.0),
        num_sms=20,
    )  # fmt: skip
    assert numbers == json.loads(json.dumps(want.as_dict()))

    picture = tmp_path / "plan.png"
    told = run(app, [*options, "--plot", str(picture)])
    assert told.exit_code == 0, told.output
    for words in ("2 x 2 ranks", "bound by", "NIC in, GB/s", "rails: staging"):
        assert words in told.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_command_takes_every_word_the_deployment_does() -> None:
    given = {"layout": "slab", "mode": "direct", "dtype": "bf16", "partials": "fp32"}
    options = [f"--{name}={word}" for name, word in given.items()]
    said = CliRunner().invoke(app, ["plan", "--preset", "two-gpus", *options, "--json"])
    assert said.exit_code == 0, said.output
    told = json.loads(said.stdout)["deployment"]
    assert [told[n] for n in ("layout", "mode", "x_dtype", "partials")] == list(given.values())


def test_command_says_which_calls_are_small_batches() -> None:
    options = ["plan", "--preset", "node", "--tokens", "128"]
    for more, dispatch in (([], "yes"), (["--sync"], "no")):
        said = CliRunner().invoke(app, [*options, *more])
        assert said.exit_code == 0, said.output
        line = next(line for line in said.stdout.splitlines() if "small batch" in line)
        assert re.findall("yes|no", line) == [dispatch, "no", "yes"]


def test_presets_may_lose_their_replicas_and_limits() -> None:
    said = CliRunner().invoke(
        app, ["plan", "--nodes", "8", "--slots", "0", "--top-groups", "0", "--json"]
    )
    assert said.exit_code == 0, said.output
    numbers = json.loads(said.stdout)
    assert numbers["deployment"]["num_slots"] is None
    assert numbers["routing"]["drawn_tokens"] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--nodes", "5"], "multiple of 40 ranks"),
        (["--sms", "200"], "num_sms=200"),
        (["--plot", "plan.bmp"], "want a name ending in"),
    ],
)
def test_what_cannot_be_planned_is_said(options: list[str], words: str) -> None:
    said = CliRunner().invoke(app, ["plan", *options])
    assert said.exit_code == 2
    assert words in said.stderr


def test_curve_goes_on_as_long_as_ranks_have_experts() -> None:
    plans = curve(PRESETS["node"])
    assert [p.deployment.num_ranks for p in plans] == [8, 16, 32, 64, 128, 256]
    times = [p.combine.time_us for p in plans]
    assert times == sorted(times)
