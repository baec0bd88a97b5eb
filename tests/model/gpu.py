"""The same protocol as GPUs run it: rows move by bulk copies, which live in another proxy.

A bulk copy is issued by a thread and carried out by an agent of its own. Nothing orders the two but
`fence.proxy.async` (what the thread has acquired, the agent's next accesses come after) and
completion (what the agent did, the thread's next release covers). The CPU backend is the same with
other names: a non-temporal store is ordered by `sfence` only.
"""

from __future__ import annotations

from typing import Any

from .protocol import Protocol, Turn


class GpuProtocol(Protocol):
    def _threads(self) -> None:
        super()._threads()
        self.bulk = [self.machine.thread(f"rank {r} bulk") for r in self.ranks]

    def agent(self, t: Turn) -> int:
        return self.bulk[t.r].number

    def fence_before_push(self, t: Turn) -> None:
        t.v.pass_on(self.comm[t.r].number, self.agent(t))

    def fence_before_pull(self, t: Turn) -> None:
        t.v.pass_on(self.comm[t.r].number, self.agent(t))

    def wait_stores(self, t: Turn) -> None:
        """cp.async.bulk.wait_group 0"""
        t.v.pass_on(self.agent(t), self.comm[t.r].number)

    def wait_loads(self, t: Turn) -> None:
        """The mbarrier the loads complete on."""
        t.v.pass_on(self.agent(t), self.comm[t.r].number)

    def judge_bases(self, t: Turn, bases: Any) -> Any:
        failed = super().judge_bases(t, bases)
        if failed is None:
            self.fence_before_push(t)
        return failed

    def store_row(self, t: Turn, p: int, place: tuple[int, int, int], tag: tuple[Any, ...]) -> None:
        t.v.write(self.rows[place], tag, by=self.agent(t))
        self.wait_stores(t)
        t.v.add(self.arrived[p, t.slot, t.r], 1)

    def pull_rows(self, t: Turn, p: int) -> None:
        self.fence_before_pull(t)
        super().pull_rows(t, p)
        self.wait_loads(t)

    def load_row(self, t: Turn, place: tuple[int, int, int], by: int | None = None) -> None:
        super().load_row(t, place, self.agent(t))
