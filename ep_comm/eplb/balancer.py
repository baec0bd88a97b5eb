"""When to rebalance: a plan is worth its moves only if the load it answers to lasts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ep_comm.buffer import Buffer
from ep_comm.checks import positive
from ep_comm.eplb.placement import Placement
from ep_comm.eplb.planner import plan
from ep_comm.eplb.stats import LoadStats
from ep_comm.errors import make_error


class Balancer:
    """Watches the load and proposes placements.

        balancer = Balancer(buffer, placement, num_groups=8)
        moving = None
        for batch in batches:
            serve(batch)                                  # buffer.dispatch(..., layer=n)
            if moving is None:
                new = balancer.step()                     # a placement, once in a while
                moving = new and migrate(buffer, balancer.placement, new, weights)
            elif moving.step():                           # one bounded piece; True: in force
                balancer.adopt(moving.new)
                moving = None

    Every `every` steps the load of all ranks is added up and a plan made that stays close to the
    one in force. It is proposed when its gain, the mean over layers of the heaviest rank's load now
    over that under the plan, less one, was above `threshold` in `patience` checks in a row; after
    a change, `rest` checks pass without a proposal. So bursts shorter than patience * every steps
    move nothing.

    Args:
        placement: in force; set on the buffer here.
        every, threshold, patience, rest: see above.
        options: of `plan`: num_groups, policy, num_shared, num_topk, distinct, slack.
        window, half_life: of LoadStats; half_life given: the decayed load is used.

    Collective: every rank makes one and calls `step` alike; all get the same answer. With shared
    experts (num_shared > 0) the buffer counts the routed ones, and theirs follows.
    """

    def __init__(
        self,
        buffer: Buffer,
        placement: Placement,
        *,
        every: int = 256,
        threshold: float = 0.05,
        patience: int = 2,
        rest: int = 2,
        window: int = 256,
        half_life: float | None = None,
        **options: Any,
    ) -> None:
        positive("every", every)
        positive("patience", patience)
        positive("rest", rest, 0)
        if not threshold >= 0:
            raise make_error("E203", f"rejected threshold={threshold}: want >= 0")
        self.placement = placement
        self.gain = 0.0  # of the last check
        self._buffer, self._options = buffer, options
        self._every, self._threshold = every, threshold
        self._patience, self._rest = patience, rest
        self._steps = self._above = self._resting = 0
        buffer.set_placement(placement)
        self._decays = half_life is not None
        self.stats = LoadStats(buffer, window=window, half_life=half_life or 1.0)

    def step(self) -> Placement | None:
        """Call once per step of the engine; a placement worth moving to, or None.

        Cost: mostly a copy of the counters; every `every` steps a small dispatch and a plan.
        """
        self.stats.step()
        self._steps += 1
        if self._steps % self._every != 0:
            return None
        return self.check(self.stats.total(decayed=self._decays))

    def check(self, load: Tensor) -> Placement | None:
        """The decision alone, for a load [layers, experts] from elsewhere. Local."""
        if self._resting > 0:
            self._resting -= 1
            return None
        old = self.placement
        num_shared = self._options.get("num_shared", 0)
        routed = load[:, : old.num_logical - num_shared]
        new = plan(
            routed, old.num_ranks, old.num_nodes, old.num_slots, current=old, **self._options
        )
        self.gain = self._gain(routed, new)
        self._above = self._above + 1 if self.gain > self._threshold else 0
        if self._above < self._patience:
            return None
        self._above = 0
        return new

    def _gain(self, routed: Tensor, new: Placement) -> float:
        assert new.rank_load is not None
        after = new.rank_load.amax(1)
        load = routed.to(torch.float64)
        if (num_shared := self._options.get("num_shared", 0)) > 0:
            tokens = load.sum(1, keepdim=True) / self._options["num_topk"]
            load = torch.cat([load, tokens.expand(-1, num_shared)], 1)
        before = self.placement.predict_load(load).amax(1)
        return float(torch.where(after > 0, before / after, 1.0).mean()) - 1

    def adopt(self, placement: Placement) -> None:
        """Tell that `placement` is in force from now on."""
        self.placement = placement
        self._resting, self._above = self._rest, 0
