"""Expert load balancing: redundant experts, where they live, and how they get there.

    placement = eplb.plan(load, num_ranks=32, num_nodes=4, num_replicas=288, num_groups=8)

trace       a recorded routing, and the loads that follow from it
planner     loads to placement; the search itself is csrc/eplb
placement   tables, predictions, differences
convention  the same behind the signature that engines have
stats       load over time, from what dispatch counts
balancer    when a new plan is worth its moves
migrate     moving experts in pieces, changing over on all ranks at once
transport   bytes between ranks as rows of a dispatch
"""

from ep_comm.eplb.balancer import Balancer
from ep_comm.eplb.convention import rebalance_experts
from ep_comm.eplb.migrate import Migration, migrate, transfers
from ep_comm.eplb.placement import Placement, initial_placement
from ep_comm.eplb.planner import plan, with_predictions
from ep_comm.eplb.stats import LoadStats
from ep_comm.eplb.trace import Trace

__all__ = [
    "Balancer",
    "LoadStats",
    "Migration",
    "Placement",
    "Trace",
    "initial_placement",
    "migrate",
    "plan",
    "rebalance_experts",
    "transfers",
    "with_predictions",
]
