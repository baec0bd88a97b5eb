"""Expert load balancing: redundant experts, where they live, and how they get there.

    placement = eplb.plan(load, num_ranks=32, num_nodes=4, num_replicas=288, num_groups=8)

trace       a recorded routing, and the loads that follow from it
planner     loads to placement; the search itself is csrc/eplb
placement   tables, predictions, differences
convention  the same behind the signature that engines have
"""

from ep_comm.eplb.convention import rebalance_experts
from ep_comm.eplb.placement import Placement, initial_placement
from ep_comm.eplb.planner import plan
from ep_comm.eplb.trace import Trace

__all__ = ["Placement", "Trace", "initial_placement", "plan", "rebalance_experts"]
