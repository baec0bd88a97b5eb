"""Figures of the README: made from records, and refused when records are missing."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("bench_plot", ROOT / "bench/plot.py")
assert _spec is not None
assert _spec.loader is not None
plot = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plot)

Record = dict[str, Any]
PREFILL = plot.PREFILL


def record(case: str, op: str, sms: int, p50: float, commit: str = "new") -> Record:
    time = {"p10": p50 - 1, "p50": p50, "p90": p50 + 2, "min": p50 - 2, "n": 20}
    which = {"case": case, "op": op, "sms": sms, "correct": True}
    return which | {"time_us": time, "gpu": "GPU", "commit": commit}


def of_sms(commit: str = "new", factor: float = 1.0) -> list[Record]:
    ops = [(op, sms) for op in plot.SMS_OPS for sms in (8, 12, 16, 20)]
    lines = [record(PREFILL, op, sms, factor * 3000 / sms, commit) for op, sms in ops]
    return [record(PREFILL, plot.COPY, 0, factor * 160, commit), *lines]


def of_tokens() -> list[Record]:
    return [
        record(f"ep2-t{t}-h7168-top8of256-bf16{slab}-static", op, 0, 20 + t / 10)
        for t in plot.TOKENS
        for slab in ("", "-fp8-slab")
        for op in (*plot.COPIES, *plot.DECODE_OPS)
    ]


def run(tmp_path: Path, name: str, records: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / plot.FILES[name]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    command = ["plot.py", name, "--results", str(tmp_path), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    plot.main()


def test_lines_are_of_the_last_run_only() -> None:
    records = [*of_sms("old", 2.0), *of_sms("new", 1.0)]
    lines, copy_us, _ = plot.sms_lines(records)
    assert copy_us == 160
    assert [point[:3:2] for point in lines["dispatch"]] == [
        (8, 375.0), (12, 250.0), (16, 187.5), (20, 150.0)
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["sms", "latency"])
def test_figure_is_drawn(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    run(tmp_path, name, of_sms() if name == "sms" else of_tokens(), monkeypatch)
    for kind in ("svg", "png"):
        assert (tmp_path / f"nvlink_{name}.{kind}").stat().st_size > 10_000


def without(records: list[Record], op: str, **values: Any) -> list[Record]:
    return [r for r in records if r["op"] != op or any(r[k] != v for k, v in values.items())]


SLAB_64 = "ep2-t64-h7168-top8of256-bf16-fp8-slab-static"


@pytest.mark.parametrize(
    ("name", "records", "message"),
    [
        ("sms", without(of_sms(), plot.COPY), f"lacks\n  {plot.COPY}"),
        ("sms", without(of_sms(), "combine", sms=8), "combine of .*: 3 counts of SMs, want 4"),
        ("sms", [*of_sms("old"), of_sms("new")[0]], "new on GPU lacks\n  dispatch of"),
        ("sms", of_tokens(), "no record of ep2-t4096"),
        ("sms", [*of_sms(), of_sms()[3] | {"correct": False}], "wrong results: dispatch of"),
        ("latency", of_sms(), "no record of small batches"),
        ("latency", without(of_tokens(), "combine", case=SLAB_64), "combine of slab.*: 64 tokens"),
    ],
)
def test_missing_records_are_named(
    name: str, records: list[Record], message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, name, records, monkeypatch)


def test_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["plot.py", "latency", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"nvlink_latency\.jsonl is not there"):
        plot.main()


def test_records_in_the_tree_are_enough_for_the_sms() -> None:
    lines, copy_us, _ = plot.sms_lines(plot.read(plot.RESULTS / plot.FILES["sms"]))
    assert copy_us > 0
    assert all(line[0][2] > line[-1][2] for line in lines.values())
