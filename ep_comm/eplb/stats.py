"""Load of logical experts over time, from what dispatch counts anyway."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from ep_comm.buffer import Buffer
from ep_comm.checks import positive
from ep_comm.eplb.transport import reduce_sum
from ep_comm.errors import make_error


class LoadStats:
    """What this rank dispatched lately, per layer and logical expert; L layers, E experts.

    Args:
        buffer: with a placement; its `load` is read, on its device.
        window: steps that `windowed` looks back.
        half_life: steps after which a selection counts half in `decayed`.
    Raises:
        EPArgumentError: E203.
    """

    def __init__(self, buffer: Buffer, *, window: int = 256, half_life: float = 128.0) -> None:
        positive("window", window)
        if not half_life > 0:
            raise make_error("E203", f"rejected half_life={half_life}: want > 0")
        self._buffer, self._keep, self._window = buffer, 0.5 ** (1 / half_life), window
        self._start(self._counters())
        self._seen = self._source.clone()  # what was there before is no load of ours

    def _counters(self) -> Tensor:
        if self._buffer.load is None:
            raise make_error("E203", "rejected buffer: want set_placement() first")
        return self._buffer.load

    def _start(self, source: Tensor) -> None:
        self._source, self._seen = source, torch.zeros_like(source)
        self._past: deque[Tensor] = deque([torch.zeros_like(source)], maxlen=self._window + 1)
        self._decayed = torch.zeros_like(source, dtype=torch.float64)

    def step(self) -> None:
        """Close a step: what was dispatched since the last one is its load. Local, no wait.

        If the buffer counts other layers or experts by now, all starts anew.
        """
        source = self._counters()
        if source.shape != self._source.shape:
            self._start(source)
        elif source is not self._source:  # placements were off in between: it counts from 0
            self._source, self._seen = source, torch.zeros_like(source)
        now = source.clone()
        came = now - self._seen
        self._seen = now
        self._decayed = self._decayed * self._keep + came
        self._past.append(self._past[-1] + came)

    @property
    def windowed(self) -> Tensor:
        """int64 [L, E] selections of the last `window` steps."""
        return self._past[-1] - self._past[0]

    @property
    def decayed(self) -> Tensor:
        """float64 [L, E] selections, older ones counting less."""
        return self._decayed

    def total(self, *, decayed: bool = False) -> Tensor:
        """float64 [L, E] of all ranks together, on the CPU; the same on all ranks.

        Collective: one small dispatch of L * E words to every rank.
        """
        mine = self.decayed if decayed else self.windowed.to(torch.float64)
        return reduce_sum(self._buffer, mine, "eplb load").cpu()
