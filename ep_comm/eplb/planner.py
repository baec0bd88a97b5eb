"""`plan`: loads, or a recorded routing, in; a Placement out."""

from __future__ import annotations

from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from ep_comm import _core
from ep_comm.checks import as_tensor, one_of, positive
from ep_comm.eplb.placement import Placement, check_world
from ep_comm.eplb.trace import Trace
from ep_comm.errors import make_error, shown

Policy = Literal["auto", "hierarchical", "global"]
POLICIES: Final = get_args(Policy)


def plan(
    load: Tensor | Trace | Any,
    num_ranks: int,
    num_nodes: int,
    num_replicas: int,
    num_groups: int = 1,
    current: Placement | None = None,
    *,
    policy: Policy = "auto",
    num_shared: int = 0,
    num_topk: int | None = None,
    distinct: bool | Literal["always"] = True,
    slack: float = 0.02,
    node_slack: float = 0.01,
) -> Placement:
    """Decide which experts get replicas, and where every replica lives, layer by layer.

    Hierarchical: groups of consecutive experts are packed onto nodes, replicas are made inside
    nodes, then packed onto ranks, so that group-limited routing keeps its locality. Global: no
    regard for groups. Both start as the public greedy does (a further replica for the heaviest,
    longest-processing-time first) and go on from there: swaps and exchanges of replicas until the
    heaviest rank cannot be lowered by one step, then a bounded search from elsewhere.

    Args:
        load: [layers, experts] or [experts], any integer or floating dtype, non-negative; or a
            Trace, whose co-activation is then used to cut traffic between nodes: whole groups
            change places (hierarchical; num_groups=experts lets every expert move alone), or whole
            ranks (global, which costs no balance).
        num_ranks, num_nodes: ranks stand node by node, equally many on each.
        num_replicas: slots in total, a multiple of num_ranks; all are filled.
        num_groups: of consecutive experts, equally many in each.
        current: what is in force, to move little: it is repaired until the heaviest rank is within
            `slack` of a fresh plan's; a layer where that fails gets the fresh plan, its nodes,
            ranks and slots named so that most experts stay.
        policy: "auto": hierarchical when num_groups is a multiple of num_nodes, else global, as
            `rebalance_experts` has it.
        num_shared: experts chosen by every token, behind the others; hierarchical: on every node.
            Their load is that of all tokens, which needs num_topk unless a Trace says it.
        distinct: True: replicas of an expert on different ranks, if ranks have no more slots than
            there are experts. Only in a layer where the public greedy, which may put two on one
            rank, has a lighter heaviest rank than every such plan that was found, the nodes
            (global: the layer) that are heavier than its do so, too: a matter of two ranks and a
            few experts each. "always": not even then. False: it does not matter.
        slack: see `current`; 0.02 = 2 %.
        node_slack: how much heavier the heaviest node may get for less traffic; with a Trace.
    Returns:
        Placement with `rank_load` and `traffic` predicted; every slot is filled. Equal input gives
        equal output; ties go to the lower index; scaling loads by a power of two changes nothing.
    Raises:
        EPArgumentError: E200, E201, E203.

    Cost: one core; 58 layers x 256 experts on 288 slots take tens of milliseconds (docs/eplb.md).
    """
    trace = load if isinstance(load, Trace) else None
    loads = trace.load() if trace is not None else check_load(load)
    num_layers, num_experts = loads.shape
    positive("num_shared", num_shared, 0)
    positive("num_groups", num_groups)
    one_of("policy", policy, POLICIES)
    check_world(num_replicas, num_ranks, num_nodes)
    hierarchical = _is_hierarchical(policy, num_experts, num_groups, num_nodes)
    _check_room(num_replicas, num_experts, num_shared, num_nodes if hierarchical else 1)
    slacks = _not_negative("slack", slack), _not_negative("node_slack", node_slack)
    if num_shared > 0:
        tokens = loads.sum(1, keepdim=True) / _topk(num_topk, trace)
        loads = torch.cat([loads, tokens.expand(-1, num_shared)], 1)
    args = _core.PlanArgs()
    together = trace.together() if trace is not None and num_nodes > 1 else None
    old = None if current is None else _slots_of(current, num_layers, num_experts + num_shared,
                                                 num_replicas, num_ranks, num_nodes)  # fmt: skip
    loads = loads.contiguous()
    slots = torch.empty((num_layers, num_replicas), dtype=torch.int32)
    args.load, args.expert = loads.data_ptr(), slots.data_ptr()
    args.together = 0 if together is None else together.data_ptr()
    args.current = 0 if old is None else old.data_ptr()
    args.num_layers, args.num_experts, args.num_shared = num_layers, num_experts, num_shared
    args.num_slots, args.num_ranks, args.num_nodes = num_replicas, num_ranks, num_nodes
    args.num_groups, args.hierarchical = num_groups, hierarchical
    args.distinct = _distinct(distinct)
    args.slack, args.node_slack = slacks
    _core.plan(args)
    placement = Placement(slots.to(torch.int64), num_experts + num_shared, num_ranks, num_nodes)
    return with_predictions(placement, loads, trace if num_shared == 0 else None)


def with_predictions(placement: Placement, load: Tensor, trace: Trace | None = None) -> Placement:
    """The same placement, with the load of ranks and the traffic of nodes that follow from it."""
    return Placement(
        placement.physical_to_logical,
        placement.num_logical,
        placement.num_ranks,
        placement.num_nodes,
        rank_load=placement.predict_load(load),
        traffic=placement.predict_traffic(load if trace is None else trace),
    )


def check_load(load: Any) -> Tensor:
    """`load` as float64 [layers, experts] on the CPU; E200, E201 or E203 unless it is such."""
    tensor = as_tensor("load", load)
    if tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise make_error("E200", f"rejected load: got {tensor.dtype}, want numbers")
    if tensor.dim() == 1:
        tensor = tensor.unsqueeze(0)
    if tensor.dim() != 2 or tensor.shape[1] == 0:
        got = list(tensor.shape)
        raise make_error("E201", f"rejected load: got {got}, want [layers, experts]")
    loads = tensor.detach().to("cpu", torch.float64)
    if not bool(((loads >= 0) & loads.isfinite()).all()):
        raise make_error("E203", "rejected load: want finite numbers >= 0")
    return loads


def _not_negative(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise make_error("E203", f"rejected {name}={shown(value)}: want a number >= 0")
    return float(value)


def _is_hierarchical(policy: str, num_experts: int, num_groups: int, num_nodes: int) -> bool:
    fits = num_experts % num_groups == 0 and num_groups % num_nodes == 0
    if policy == "hierarchical" and not fits:
        what = (
            f"rejected num_groups={num_groups}: want a multiple of {num_nodes} nodes that divides"
        )
        raise make_error("E203", f"{what} {num_experts} experts", fix="or take policy='global'")
    return fits and policy != "global"


def _check_room(num_slots: int, num_experts: int, num_shared: int, num_nodes: int) -> None:
    need = num_experts + num_shared * num_nodes
    if num_slots < need:
        what = f"rejected num_replicas={num_slots}: want >= {need}, a slot for every expert"
        raise make_error("E203", what)


def _distinct(distinct: Any) -> _core.Distinct:
    if distinct == "always":
        return _core.Distinct.ALWAYS
    if not isinstance(distinct, bool):
        what = f"rejected distinct={shown(distinct)}: want True, False or 'always'"
        raise make_error("E203", what)
    return _core.Distinct.PREFER if distinct else _core.Distinct.NEVER


def _topk(num_topk: int | None, trace: Trace | None) -> int:
    if num_topk is None and trace is not None:
        return trace.num_topk
    if num_topk is None:
        raise make_error("E203", "rejected num_topk=None: want it with num_shared > 0")
    return positive("num_topk", num_topk)


def _slots_of(
    current: Placement, layers: int, experts: int, slots: int, ranks: int, nodes: int
) -> Tensor:
    got = (current.num_layers, current.num_logical, current.num_slots, current.num_ranks,
           current.num_nodes)  # fmt: skip
    want = (layers, experts, slots, ranks, nodes)
    if got != want:
        names = "layers, experts, slots, ranks, nodes"
        raise make_error("E203", f"rejected current: of {got} {names}, want {want}")
    return current.physical_to_logical.to(torch.int32).contiguous()
