"""`import deep_ep` by programs that know nothing of ep_comm: three ways in, and what imports do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ep_comm.compat import TOP_LEVEL, python_path
from ep_comm.compat.__main__ import command_of

ROOT = Path(__file__).resolve().parents[1]

# What programs do at import time, in one interpreter: it takes seconds to start with torch.
TRAPS = """
import importlib.util, os, sys
before = dict(os.environ)
from ep_comm.compat import install
install(); install()
assert "torch" not in sys.modules
for name in ("deep_ep", "deep_ep_cpp"):  # a probe, before the import
    assert importlib.util.find_spec(name) is not None, name

from deep_ep.utils import EventHandle, EventOverlap
from deep_ep_cpp import Config as CppConfig, EventHandle as CppHandle, topk_idx_t
import deep_ep, deep_ep.buffers.legacy, deep_ep._C, deep_ep.buffer
import torch

assert deep_ep.EventHandle is EventHandle is CppHandle is deep_ep._C.EventHandle
assert deep_ep.EventOverlap is EventOverlap is deep_ep.utils.EventOverlap
assert deep_ep.Config is CppConfig and isinstance(deep_ep.Buffer, type)
assert deep_ep.buffer.Buffer is deep_ep.buffers.legacy.Buffer is deep_ep.Buffer
assert deep_ep.topk_idx_t is topk_idx_t is torch.int64
assert isinstance(deep_ep.__version__, str) and not deep_ep.__version__.startswith("2")
for absent in ("ElasticBuffer", "EPHandle", "HybridEPBuffer"):
    assert not hasattr(deep_ep, absent), absent
    try:
        exec(f"from deep_ep import {absent}")
        raise SystemExit(f"{absent} is there")
    except ImportError:
        pass
def annotated(b: deep_ep.Buffer, c: deep_ep.Config, e: deep_ep.EventOverlap) -> None: ...
deep_ep.Buffer.set_num_sms(deep_ep.Buffer.num_sms)
deep_ep.Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 256)
with deep_ep.Buffer.capture():
    pass
assert not torch.cuda.is_initialized()
assert "ep_comm._core" not in sys.modules
assert dict(os.environ) == before, "the environment was written"
pid = os.fork()
if pid == 0:
    os._exit(0 if deep_ep.EventHandle().current_stream_wait() is None else 1)
assert os.waitpid(pid, 0)[1] == 0
print("fine")
"""

# An unmodified program: two spawned ranks over gloo, and a process that has only PYTHONPATH.
PROGRAM = """
import subprocess, sys
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import deep_ep

def rank_main(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(path, 2), rank=rank, world_size=2)
    buffer = deep_ep.Buffer(dist.group.WORLD, int(1e9), 0)
    x = torch.full((4, 128), rank + 1.0, dtype=torch.bfloat16)
    topk_idx = torch.tensor([[0, 1], [2, 3], [0, 3], [-1, 2]])
    weights = torch.ones(4, 2)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 4)
    recv_x, _, _, counts, handle, _ = buffer.dispatch(
        x, num_tokens_per_rank=per_rank, is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert, topk_idx=topk_idx, topk_weights=weights)
    assert counts == [[4, 2], [4, 4]][rank], counts
    out, _, _ = buffer.combine(recv_x, handle)
    assert out[:, 0].tolist() == [(rank + 1.0) * n for n in (1, 1, 2, 1)]
    dist.barrier()
    buffer.destroy()
    dist.destroy_process_group()

if __name__ == "__main__":
    assert sys.argv[1:2] == ["--flag"]
    mp.spawn(rank_main, args=(sys.argv[2],), nprocs=2)
    subprocess.run(
        [sys.executable, "-c", "import importlib.util as u; assert u.find_spec('deep_ep_cpp')"],
        check=True)
    print("ranks agree", deep_ep.__file__)
    sys.exit(7)
"""


def _run(*arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **env},
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


def test_import_does_what_programs_probe_and_nothing_else() -> None:
    done = _run("-c", TRAPS)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def test_launcher_runs_an_unmodified_program_and_its_spawned_workers(tmp_path: Path) -> None:
    program = tmp_path / "train.py"
    program.write_text(PROGRAM)
    home = str(ROOT)  # from another folder, as an installed ep_comm would be found
    store = str(tmp_path / "store")
    done = _run(
        "-m", "ep_comm.compat", str(program), "--flag", store, cwd=tmp_path, PYTHONPATH=home
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout == f"ranks agree {TOP_LEVEL / 'deep_ep' / '__init__.py'}\n"


def test_launcher_finds_files_modules_code_and_commands(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.touch()
    for arguments in ([str(file), "-x"], ["-m", "json.tool", "-h"], ["-c", "pass"]):
        command = command_of(arguments)
        assert command[0] == sys.executable
        assert command[-len(arguments) :] == arguments
    found = command_of(["env", "-x"])
    assert os.path.isabs(found[0])
    assert found[1:] == ["-x"]
    assert command_of(["no-such-program-here"]) == []


def test_launcher_without_a_program_says_how_to_use_it() -> None:
    done = _run("-m", "ep_comm.compat")
    assert done.returncode != 0
    assert "usage: python -m ep_comm.compat" in done.stderr
    done = _run("-m", "ep_comm.compat", "no-such-program-here")
    assert done.returncode != 0
    assert "no file and no command 'no-such-program-here'" in done.stderr


def test_python_path_keeps_what_was_there_behind_ours() -> None:
    path = python_path(os.pathsep.join(["/one", str(TOP_LEVEL), "/two"])).split(os.pathsep)
    assert path[0] == str(TOP_LEVEL)
    assert path[-2:] == ["/one", "/two"]
    assert path.count(str(TOP_LEVEL)) == 1
    assert python_path(None).split(os.pathsep)[0] == str(TOP_LEVEL)


def test_install_refuses_to_replace_a_deep_ep_that_is_in_use() -> None:
    code = (
        "import sys, types; sys.modules['deep_ep'] = types.ModuleType('deep_ep')\n"
        "from ep_comm.compat import install\n"
        "try: install()\n"
        "except RuntimeError as error: print(error)"
    )
    assert "deep_ep is imported already" in _run("-c", code).stdout


@pytest.mark.slow
def test_second_wheel_installs_deep_ep_at_top_level(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-build-isolation", "--no-deps", "--no-index"]
    source = tmp_path / "compat" / "deep_ep_wheel"  # a copy: building leaves things behind
    shutil.copytree(ROOT / "compat" / "deep_ep_wheel", source)
    names_only = shutil.ignore_patterns("__pycache__")
    shutil.copytree(TOP_LEVEL, tmp_path / "ep_comm" / "compat" / "top_level", ignore=names_only)
    wheels, target = tmp_path / "wheels", tmp_path / "site"
    subprocess.run([*pip, "wheel", *offline, "-w", str(wheels), str(source)], check=True)
    (wheel,) = wheels.glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert names == {
        str(file.relative_to(TOP_LEVEL))
        for file in TOP_LEVEL.rglob("*.py")
        if file.parent != TOP_LEVEL or file.name == "deep_ep_cpp.py"
    }

    subprocess.run([*pip, "install", *offline, "--target", str(target), str(wheel)], check=True)
    path = os.pathsep.join([str(target), str(ROOT)])
    code = "import deep_ep, deep_ep_cpp; print(deep_ep.__file__, deep_ep_cpp.topk_idx_t)"
    done = _run("-c", code, cwd=tmp_path, PYTHONPATH=path)
    assert done.stdout.startswith(str(target)), done.stderr
