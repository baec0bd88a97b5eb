"""NVSHMEM without NVSHMEM: versions, who is which PE, whose world it is, memory that is kept.

The library is played by `Fabric`, its processes by threads. What the real one does is tested where
there are GPUs.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from ep_comm import build_info
from ep_comm.backends import nvshmem, nvshmem_versions
from ep_comm.bootstrap import Exchange, StoreGroup, resolve_group
from ep_comm.errors import EPError

# ---- versions ----


@pytest.mark.parametrize(
    ("host", "device", "fits"),
    [
        ("3.4.5", "3.4.5", True),
        ("3.3.20", "3.4.5", True),
        ("3.5.18", "3.4.5", True),
        ("3.5.19", "3.4.5", False),  # hangs at the first put over IBGDA
        ("3.8.0", "3.4.5", False),
        ("3.4.5", "3.5.19", False),
        ("3.8.0", "3.5.21", True),
        ("3.3.19", "3.4.5", False),
        ("4.0.0", "3.8.0", False),
    ],
)
def test_host_and_device_library_fit_on_one_side_of_the_new_queues(
    host: str, device: str, fits: bool
) -> None:
    why = nvshmem_versions.why_apart(nvshmem_versions.parse(host), nvshmem_versions.parse(device))
    assert (why is None) == fits


def test_version_texts_of_any_length_are_read() -> None:
    parse = nvshmem_versions.parse
    assert parse("3.4.5") == (3, 4, 5)
    assert parse("3.4") == (3, 4, 0)
    assert parse("3.5.19.post1") == (3, 5, 19)
    assert parse("") == (0, 0, 0)


def test_straddling_pair_is_refused_with_both_versions_and_the_place() -> None:
    plugin = SimpleNamespace(host_version=lambda: [3, 7, 2], compiled_version=lambda: [3, 4, 5])
    with pytest.raises(EPError, match="E501") as caught:
        nvshmem.check_versions(plugin, Path("/x/libnvshmem_host.so.3"))
    for words in ("host 3.7.2 at /x/libnvshmem_host.so.3", "device 3.4.5", "3.5.19", "==3.4.5"):
        assert words in str(caught.value)


# ---- what is missing ----


def test_build_without_the_plugin_names_the_package() -> None:
    if build_info()["nvshmem_missing"] is None:
        pytest.skip("this build has the plugin")
    with pytest.raises(EPError, match=r"E501.*Fix: pip install nvidia-nvshmem-cu13"):
        nvshmem.load()


def test_host_library_that_is_not_installed_names_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nvshmem, "build_info", lambda: {"nvshmem_missing": None})
    monkeypatch.setattr(nvshmem, "host_library", lambda: None)
    with pytest.raises(
        EPError, match=r"E501.*nvidia-nvshmem-cu13 is not installed.*ep-comm\[nvshmem\]"
    ):
        nvshmem.load()


def test_host_library_is_found_in_the_wheel_and_in_an_installation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(nvshmem, "find_spec", lambda name: None)
    monkeypatch.delenv("NVSHMEM_HOME", raising=False)
    assert nvshmem.host_library() is None

    there = tmp_path / "lib" / "libnvshmem_host.so.3"
    there.parent.mkdir()
    there.touch()
    monkeypatch.setenv("NVSHMEM_HOME", str(tmp_path))
    assert nvshmem.host_library() == there

    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.delenv("NVSHMEM_HOME")
    monkeypatch.setattr(nvshmem, "find_spec", lambda name: spec)
    assert nvshmem.host_library() == there


def test_importing_ep_comm_loads_no_nvshmem() -> None:
    code = (
        "import ep_comm, ep_comm.backends.nvshmem\n"
        "ep_comm.build_info(); ep_comm.capabilities()\n"
        "import sys; print('ep_comm._nvshmem' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---- settings and transports ----


def test_ibgda_is_asked_for_where_a_nic_is(tmp_path: Path) -> None:
    assert not nvshmem.has_nic(tmp_path / "infiniband")
    (tmp_path / "infiniband" / "mlx5_0").mkdir(parents=True)
    assert nvshmem.has_nic(tmp_path / "infiniband")
    assert ("NVSHMEM_IB_ENABLE_IBGDA", "1") in nvshmem.settings(nic=True)
    assert "NVSHMEM_IB_ENABLE_IBGDA" not in dict(nvshmem.settings(nic=False))


def test_transports_are_those_that_stayed_loaded() -> None:
    maps = (
        "7f00-7f10 r-xp 00000000 08:01 11 /x/lib/nvshmem_transport_ibgda.so.3\n"
        "7f10-7f20 r--p 00010000 08:01 11 /x/lib/nvshmem_transport_ibgda.so.3\n"
        "7f20-7f30 r-xp 00000000 08:01 12 /x/lib/nvshmem_transport_ibrc.so.3.0.0\n"
        "7f30-7f40 r-xp 00000000 08:01 13 /x/lib/libnvshmem_host.so.3\n"
    )
    assert nvshmem.transports(maps) == ["ibgda", "ibrc"]
    assert nvshmem.transports("") == []


# ---- who is who ----


def test_ranks_find_their_pes_in_any_order() -> None:
    assert nvshmem.pe_table(0, [(2, 4), (0, 4), (3, 4), (1, 4)]) == [2, 0, 3, 1]


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ([(0, 2), (0, 2)], "rank 1 is PE 0"),
        ([(0, 2), (2, 2)], "rank 1 is PE 2"),
        ([(0, 4), (1, 4)], "has 4 PEs, want 2"),
    ],
)
def test_world_that_is_not_the_ranks_is_refused(places: list[Any], words: str) -> None:
    with pytest.raises(EPError, match="E501") as caught:
        nvshmem.pe_table(0, places)
    assert words in str(caught.value)


def test_world_on_some_ranks_only_is_refused() -> None:
    assert nvshmem.judge_states(0, [True, True]) is True
    assert nvshmem.judge_states(0, [False, False]) is False
    with pytest.raises(EPError, match=r"E501.*rank 2 has NVSHMEM world, rank 0 differs"):
        nvshmem.judge_states(0, [False, False, True])


def test_segment_is_reused_when_no_rank_needs_it() -> None:
    free, used = True, False
    assert nvshmem.free_everywhere([[(8, free)], [(8, free)]], 8) == 0
    assert nvshmem.free_everywhere([[(8, free)], [(8, used)]], 8) is None
    assert nvshmem.free_everywhere([[(8, free), (16, free)]] * 2, 9) == 1
    assert nvshmem.free_everywhere([[], []], 8) is None


# ---- joining, with a library that is played ----


class Fabric:
    """All PEs; collectives are barriers that end when somebody stays away."""

    def __init__(
        self, size: int, order: list[int] | None = None, initialized: bool = False
    ) -> None:
        self.size, self.order = size, order or list(range(size))
        self.initialized = initialized
        self.barrier = threading.Barrier(size)
        self.memory = 1 << 20
        self.ids: list[bytes] = []
        self.asked: list[Any] = []
        self.left = 0

    def meet(self) -> None:
        self.barrier.wait(20)


class FakeError(Exception):
    pass


class Native:
    """A PE's share of the world."""

    def __init__(self, fabric: Fabric, pe: int) -> None:
        self.fabric, self.pe, self.cleared = fabric, pe, 0

    def my_pe(self) -> int:
        return self.pe

    def num_pes(self) -> int:
        return self.fabric.size

    def allocate(self, num_bytes: int) -> Any:
        self.fabric.meet()
        there = num_bytes <= self.fabric.memory
        return SimpleNamespace(address=4096 if there else 0, bytes=num_bytes if there else 0)

    def clear(self, segment: Any) -> None:
        self.cleared += 1

    def is_mapped(self, segment: Any, pe: int) -> bool:
        return pe // 2 == self.pe // 2  # two to a host

    def leave(self) -> None:
        self.fabric.left += 1


class Plugin:
    """What `ep_comm._nvshmem` is to a process."""

    NvshmemError = FakeError

    def __init__(self, fabric: Fabric, rank: int, *, refuses: bool = False) -> None:
        self.fabric, self.rank, self.refuses = fabric, rank, refuses
        self.joined = fabric.initialized
        self.World = SimpleNamespace(join=self.join)

    def is_initialized(self) -> bool:
        return self.joined

    def new_id(self) -> bytes:
        return bytes(range(128))

    def join(self, unique: bytes, pe: int, num_pes: int, settings: list[Any]) -> Native:
        if self.refuses:
            raise FakeError("nvshmemx_init_attr", 7)
        self.fabric.ids.append(unique)
        self.fabric.asked.append(settings)
        self.joined = True
        return Native(self.fabric, self.fabric.order[pe])


class Ranks:
    """Ranks as threads; each has a plugin of its own, as a process would."""

    def __init__(self, fabric: Fabric, **refuses: int) -> None:
        self.size = fabric.size
        self.store = dist.HashStore()
        self.plugins = [
            Plugin(fabric, r, refuses=r == refuses.get("refuses")) for r in range(self.size)
        ]

    def run(self, work: Any, limit_s: float = 20.0) -> list[Any]:
        """work(exchange, plugin) on every rank; exceptions stand for results."""
        results: list[Any] = [None] * self.size

        def body(rank: int) -> None:
            try:
                group = resolve_group(StoreGroup(self.store, rank, self.size, "nvshmem"))
                results[rank] = work(Exchange(group, limit_s), self.plugins[rank])
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=body, args=(r,)) for r in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return results


@pytest.fixture(autouse=True)
def no_worlds_left() -> Any:
    yield
    nvshmem._worlds.clear()


def join(exchange: Exchange, plugin: Plugin) -> nvshmem.World:
    return nvshmem.join(exchange, nic=True, plugin=plugin)


def test_new_world_gets_rank_zeros_id_and_asks_for_ibgda() -> None:
    fabric = Fabric(4, order=[1, 0, 3, 2])
    worlds = Ranks(fabric).run(join)
    assert [w.table for w in worlds] == [[1, 0, 3, 2]] * 4
    assert fabric.ids == [bytes(range(128))] * 4
    assert all(("NVSHMEM_IB_ENABLE_IBGDA", "1") in asked for asked in fabric.asked)


def test_world_of_the_application_is_used_as_it_is() -> None:
    fabric = Fabric(2, order=[1, 0], initialized=True)
    worlds = Ranks(fabric).run(join)
    assert [w.table for w in worlds] == [[1, 0]] * 2
    assert fabric.ids == [bytes(128)] * 2  # nobody made an id


def test_second_buffer_gets_the_same_world() -> None:
    ranks = Ranks(fabric := Fabric(2))
    first, second = ranks.run(join), ranks.run(join)
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert len(fabric.ids) == 2


def test_refusal_of_one_rank_is_raised_on_all() -> None:
    results = Ranks(Fabric(3), refuses=1).run(join)
    assert [getattr(r, "code", None) for r in results] == ["E501"] * 3
    assert all("nvshmemx_init_attr failed with status 7" in str(r) for r in results)
    assert [r.peer for r in results] == [1, None, 1]


def test_segments_are_kept_zeroed_and_given_to_the_next_buffer() -> None:
    ranks = Ranks(Fabric(2))

    def twice(exchange: Exchange, plugin: Plugin) -> Any:
        world = join(exchange, plugin)
        first = world.take(exchange, 4096)
        world.give(first, is_clean=True)
        again = Exchange(exchange.group, 20.0)
        second = world.take(again, 1000)
        third = world.take(Exchange(exchange.group, 20.0), 1000)
        return first, second, third, world.native.cleared

    for first, second, third, cleared in ranks.run(twice):
        assert second is first
        assert third is not first
        assert cleared == 1


def test_segment_of_a_failed_buffer_is_not_used_again() -> None:
    def work(exchange: Exchange, plugin: Plugin) -> Any:
        world = join(exchange, plugin)
        first = world.take(exchange, 4096)
        world.give(first, is_clean=False)
        return first, world.take(Exchange(exchange.group, 20.0), 4096)

    for first, second in Ranks(Fabric(2)).run(work):
        assert second is not first


def test_memory_that_is_short_fails_on_all_ranks() -> None:
    def work(exchange: Exchange, plugin: Plugin) -> Any:
        return join(exchange, plugin).take(exchange, 1 << 30)

    results = Ranks(Fabric(2)).run(work)
    assert [getattr(r, "code", None) for r in results] == ["E232"] * 2


def test_lost_world_makes_no_further_buffer() -> None:
    ranks = Ranks(Fabric(2))
    ranks.run(join)[1].lose("rank 0 died")
    results = ranks.run(join)
    assert [getattr(r, "code", None) for r in results] == ["E501"] * 2
    assert all("rank 0 died" in str(r) for r in results)


def test_transport_in_use_is_told() -> None:
    def work(exchange: Exchange, plugin: Plugin) -> Any:
        world = join(exchange, plugin)
        segment = world.take(exchange, 64)
        return world.mapped(segment), world.describe(segment)

    far = Ranks(Fabric(4)).run(work)
    assert far[0] == ([True, True, False, False], "2 mapped, 2 by an unknown transport")
    near = Ranks(Fabric(2)).run(work)
    assert near[0][1] == "2 ranks mapped"


def test_finalize_leaves_every_world_once() -> None:
    ranks = Ranks(fabric := Fabric(2))
    ranks.run(join)
    nvshmem.finalize()
    nvshmem.finalize()
    assert fabric.left == 2


# ---- the real plugin, without a GPU ----


@pytest.mark.skipif(build_info()["nvshmem"] is None, reason=str(build_info()["nvshmem_missing"]))
def test_plugin_loads_without_a_gpu_and_fits_its_library() -> None:
    if nvshmem.host_library() is None:
        pytest.skip("nvidia-nvshmem-cu13 is not installed")
    plugin = nvshmem.load()
    assert nvshmem_versions.text(plugin.compiled_version()) == build_info()["nvshmem"]
    assert len(plugin.new_id()) == nvshmem.ID_BYTES
    assert not plugin.is_initialized()
    assert "_core.RailShape" in plugin.probe.__doc__  # the core's type, not another of that name


@pytest.mark.skipif(build_info()["nvshmem"] is None, reason=str(build_info()["nvshmem_missing"]))
def test_stub_of_the_plugin_matches_the_binding() -> None:
    from test_pyi import STUB, binding_of, differences, stub_of

    text = STUB.with_name("_nvshmem.pyi").read_text(encoding="utf-8")
    found = differences(stub_of(text), binding_of(nvshmem.load()))
    assert not found, "\n" + "\n".join(found)
