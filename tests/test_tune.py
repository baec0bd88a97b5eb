"""bench/tune.py: which counts its measurements justify, and the table they become."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ep_comm.bench.cases import Case

ROOT = Path(__file__).resolve().parents[1]


def load(name: str) -> Any:
    """A script of bench/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tune = load("tune")


def record(count: int, us: float, sms: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "case": "ep2-t4096-h7168-top8of256-bf16",
        "op": "dispatch",
        "stage_bytes": 14336,
        "sms": sms,
        "count": count,
        "time_us": {"p50": us},
        "ranks": 2,
        "gpu": "GPU",
        "commit": "abc",
        "command": "torchrun --nproc-per-node 2 bench/tune.py",
        **more,
    }


ALL = [
    record(0, 200.0),
    record(9, 190.0),
    record(9, 100.0, case="ep2-t128-h7168-top8of256-bf16"),
    record(0, 100.0, stage_bytes=7168),
    record(7, 99.0, stage_bytes=7168),
    record(0, 250.0, op="dispatch quantizing", stage_bytes=14592),
    record(11, 200.0, op="dispatch quantizing", stage_bytes=14592),
    record(0, 190.0, op="combine"),
    record(4, 230.0, op="combine"),
]


@pytest.mark.parametrize(
    ("less", "chosen"), [(190.0, 9), (199.0, 0), (210.0, 0)], ids=["faster", "noise", "slower"]
)
def test_fewer_warps_are_chosen_when_they_are_clearly_faster(less: float, chosen: int) -> None:
    assert tune.choose([record(0, 200.0), record(9, less)]) == chosen


def test_other_sms_than_the_library_takes_decide_nothing() -> None:
    assert tune.choose([record(0, 200.0), record(9, 205.0), record(9, 100.0, sms=8)]) == 0


def test_table_has_an_entry_for_each_size_of_a_stage_in_large_batches() -> None:
    assert tune.entries(ALL, "dispatch") == [(0, 0), (7168, 0), (14336, 9)]
    assert tune.entries(ALL, "dispatch quantizing") == [(0, 0), (14592, 11)]
    assert tune.entries(ALL, "combine") == [(0, 0), (14336, 0)]


class FakeBench:
    """Calls cost a microsecond per SM and ten per warp or stage."""

    def __init__(self, **options: Any) -> None:
        self.case = Case(2, 4096, 7168, 8, 256, backend="nvlink", **options)
        self.backend = SimpleNamespace(num_warps=0, num_stages=0)
        self.buffer = SimpleNamespace(_backend=self.backend)
        self.called: list[Any] = []

    def times(self, work: Any, rounds: int, warmup: int) -> tuple[list[float], list[float]]:
        work()
        us = float((self.called[-1] or 0) + 10 * (self.backend.num_warps + self.backend.num_stages))
        return [us] * rounds, [0.0] * rounds


def test_sweep_measures_every_point_and_leaves_the_choice_to_the_library_again() -> None:
    bench = FakeBench()
    found = list(tune.sweep(bench, "combine", (0, 8), (0, 3), bench.called.append))
    assert [(r["sms"], r["count"], r["time_us"]["p50"]) for r in found] == [
        (0, 0, 0.0),
        (8, 0, 8.0),
        (0, 3, 30.0),
        (8, 3, 38.0),
    ]
    assert bench.called == [None, 8, None, 8]
    assert bench.backend == SimpleNamespace(num_warps=0, num_stages=0)


@pytest.mark.parametrize(
    ("dtype", "op", "stage"),
    [
        ("bf16", "dispatch", 14336),
        ("fp8", "dispatch", 7168),
        ("bf16", "dispatch quantizing", 14592),  # with 56 scales, on 128 bytes
        ("bf16", "combine", 14336),
    ],
)
def test_stage_holds_a_row_and_its_scales(dtype: str, op: str, stage: int) -> None:
    assert tune.stage_bytes(FakeBench(dtype=dtype).case, op) == stage


def test_written_table_compiles_and_is_found_again(tmp_path: Path) -> None:
    source = tune.with_tables(tune.TABLE.read_text(), ALL)
    assert tune.with_tables(source, []) == tune.with_tables(tune.TABLE.read_text(), [])
    (tmp_path / "tuned.h").write_text(source)
    (tmp_path / "main.cc").write_text(
        '#include "tuned.h"\n'
        "using namespace ep::kernels;\n"
        "static_assert(tuned(kMovers, 14336, 15) == 9 && tuned(kMovers, 20000, 5) == 5);\n"
        "static_assert(tuned(kMovers, 7168, 19) == 19 && tuned(kMovers, 128, 19) == 19);\n"
        "static_assert(tuned(kQuantizers, 14592, 15) == 11 && tuned(kPullStages, 14336, 6) == 6);\n"
    )
    command = ["c++", "-std=c++20", "-fsyntax-only", "-Wall", "-Werror", str(tmp_path / "main.cc")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_table_in_the_source_is_that_of_the_records() -> None:
    """After a measurement: python bench/tune.py --write"""
    source = tune.TABLE.read_text()
    want = tune.with_tables(source, tune.read(tune.RESULTS))
    assert source == want


def test_summary_says_what_the_library_loses_to_the_best_of_the_grid() -> None:
    lines = list(tune.summary([record(0, 200.0), record(9, 190.0), record(0, 180.0, sms=20)]))
    assert len(lines) == 1
    assert lines[0].endswith("200.0 us; least 180.0 us (-10.0 %) with 20 SMs, all warps")
