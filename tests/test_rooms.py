"""The rooms of csrc/ and their walls. A wall moves by a change here, in the commit needing it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"

# Room -> the rooms it may include, besides itself. Nothing points up.
MAY_INCLUDE: dict[str, tuple[str, ...]] = {
    "contract": (),
    "device": ("contract",),
    "kernels": ("contract", "device"),
    "transport": ("contract",),
    "host": ("contract", "transport", "kernels"),
    "cpu": ("contract", "transport", "host"),  # host: both backends grant extents from one arena
    "eplb": (),  # arithmetic on loads: knows no buffer
    "bind": ("contract", "host", "cpu", "transport", "eplb"),
    # A library of its own beside the core: a transport, the kernels that are compiled for it, since
    # device code of two libraries cannot be linked, and the module that binds both.
    "plugin": ("contract", "device", "kernels", "transport"),
}
EVERY_ROOM = tuple(MAY_INCLUDE)
DEVICE_CODE = ("device", "kernels", "plugin")


class Wall(NamedTuple):
    """What `pattern` finds in `rooms` belongs into `homes`: files, or "room/"; none = nowhere."""

    what: str
    pattern: str
    rooms: tuple[str, ...]
    homes: tuple[str, ...]
    instead: str
    in_comments: bool = False


ONLY_IN = [
    Wall(
        "inline assembly",
        r"\b(asm|__asm__|__asm)\b",
        EVERY_ROOM,
        ("device/ptx.cuh",),
        "call a wrapper there that is named after the instruction",
    ),
    Wall(
        "a device timer",
        r"\bglobaltimer\w*|\bclock(64|_hi)?\s*\(|\b(__)?nanosleep\w*\s*\(",
        DEVICE_CODE,
        ("device/wait.cuh", "device/ptx.cuh"),  # the latter holds the instruction itself
        "time is for waits only: call wait_until",
    ),
    Wall(
        "pybind11",
        r"\bpybind11\b|\bPYBIND11_\w+",
        EVERY_ROOM,
        ("bind/", "plugin/bind_nvshmem.cc"),
        "the rooms below take integers and structs",
    ),
    Wall(
        "an NVSHMEM header",
        r'#\s*include\s*[<"]nvshmem',
        EVERY_ROOM,
        ("device/rail_nvshmem.cuh", "transport/nvshmem.cc"),
        "kernels use device/rail.cuh and do not know which library is below",
    ),
    Wall(
        "a kernel launch",
        r"<<<",
        EVERY_ROOM,
        ("kernels/",),
        "call the launcher that closes the kernel's file",
    ),
]

NOWHERE = [
    Wall(
        "an include of torch",
        r'#\s*include\s*[<"](torch|ATen|c10)/',
        EVERY_ROOM,
        (),
        "tensors stay in ep_comm/buffer.py; pass addresses and sizes",
    ),
    Wall(
        "printf, a trap or an assert in device code",
        r"\bprintf\s*\(|\b__trap\s*\(|\bassert\s*\(",
        DEVICE_CODE,
        (),
        "let wait_until of device/wait.cuh record an Incident; the host raises it",
    ),
    Wall(
        "an include of CUDA in a room without it",
        r'#\s*include\s*[<"]cuda',
        ("contract", "cpu"),
        (),
        "host/, transport/ and kernels/ know the CUDA runtime",
    ),
    Wall(
        "a note to do something later",
        r"\b(TODO|FIXME)\b",
        EVERY_ROOM,
        (),
        "open an issue and cite it",
        in_comments=True,
    ),
]

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(["<])([^">\n]+)[">]', re.MULTILINE)
_COMMENT_OR_LITERAL = re.compile(
    r"""//[^\n]* | /\*.*?\*/ | (?P<literal> "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])' )""",
    re.DOTALL | re.VERBOSE,
)


def without_comments(text: str) -> str:
    """Blank comments and keep every line where it was; literals stay, they may be include paths."""

    def blank(match: re.Match[str]) -> str:
        return match[0] if match["literal"] else "\n" * match[0].count("\n")

    return _COMMENT_OR_LITERAL.sub(blank, text)


def broken_includes(name: str, text: str) -> Iterator[str]:
    room = name.partition("/")[0]
    allowed = (room, *MAY_INCLUDE[room])
    for match in _INCLUDE.finditer(text):
        where = f"csrc/{name}:{text.count(chr(10), 0, match.start()) + 1}"
        quote, path = match.groups()
        first, slash, _ = path.partition("/")
        if quote == '"' and not (slash and first in MAY_INCLUDE):
            yield f'{where}: includes "{path}"; name the room: "{room}/{path}"'
        elif first in MAY_INCLUDE and slash and first not in allowed:
            users = ", ".join(r for r, below in MAY_INCLUDE.items() if first in below)
            yield (
                f'{where}: {room} may include {", ".join(allowed)}, not "{path}"; '
                f"move what needs it to a room that may ({users})"
            )
        elif room == "contract" and quote == "<" and not re.fullmatch(r"[a-z_]+", path):
            yield (
                f"{where}: contract includes only the C++ standard library, not <{path}>; "
                "its home is the room that talks to that library"
            )


def broken_walls(name: str, text: str) -> Iterator[str]:
    code = without_comments(text)
    for wall in ONLY_IN + NOWHERE:
        at_home = name in wall.homes or f"{name.partition('/')[0]}/" in wall.homes
        if at_home or name.partition("/")[0] not in wall.rooms:
            continue
        searched = text if wall.in_comments else code
        matches = re.finditer(wall.pattern, searched)
        lines = {searched.count("\n", 0, match.start()) + 1 for match in matches}
        for line in sorted(lines):
            home = f"its home is {' or '.join(wall.homes)}" if wall.homes else "it has no home here"
            yield f"csrc/{name}:{line}: {wall.what}; {home}: {wall.instead}"


def broken_rules(csrc: Path) -> list[str]:
    """Every broken rule under a csrc/ folder, one sentence each."""
    found = []
    for path in sorted(p for p in csrc.rglob("*") if p.is_file() and p.suffix != ".md"):
        name = path.relative_to(csrc).as_posix()
        if name.partition("/")[0] not in MAY_INCLUDE or "/" not in name:
            found.append(f"csrc/{name}: not in a room; rooms are {', '.join(MAY_INCLUDE)}")
            continue
        text = path.read_text(encoding="utf-8")
        found += [*broken_includes(name, without_comments(text)), *broken_walls(name, text)]
    return found


def test_rooms_keep_their_walls() -> None:
    found = broken_rules(CSRC)
    assert not found, "\n" + "\n".join(found)


# ---- the rules themselves, over a fake tree ----

SEEDED = {
    "room-above": ("contract/a.h", '#include "host/b.h"', "contract may include"),
    "room-beside": ("cpu/a.cc", '#include "kernels/k.cuh"', "cpu may include"),
    "room-above-in-angles": ("transport/a.cc", "#include <cpu/rank.h>", "transport may include"),
    "no-room-named": ("host/a.cc", '#include "arena.h"', 'name the room: "host/arena.h"'),
    "contract-beyond-std": ("contract/a.h", "#include <sys/mman.h>", "only the C++ standard"),
    "file-outside-rooms": ("util/a.h", "", "not in a room"),
    "asm-in-kernel": ("kernels/a.cu", 'asm volatile("nop;");', "its home is device/ptx.cuh"),
    "timer-in-kernel": ("kernels/a.cu", "auto t = clock64();", "its home is device/wait.cuh"),
    "pybind-in-host": ("host/a.cc", "#include <pybind11/pybind11.h>", "its home is bind/"),
    "nvshmem-in-kernel": ("kernels/a.cu", "#include <nvshmem.h>", "its home is device/rail"),
    "nvshmem-in-plugin": ("plugin/a.cu", "#include <nvshmemx.h>", "its home is device/rail"),
    "core-in-plugin": ("plugin/a.cc", '#include "host/arena.h"', "plugin may include"),
    "launch-in-plugin": ("plugin/a.cu", "kernel<<<1, 32>>>();", "its home is kernels/"),
    "launch-in-host": ("host/a.cc", "kernel<<<1, 32>>>();", "its home is kernels/"),
    "torch-in-bind": ("bind/a.cc", "#include <torch/extension.h>", "no home here"),
    "printf-in-device": ("device/a.cuh", 'printf("%d", x);', "no home here"),
    "trap-in-device": ("device/a.cuh", "__trap();", "no home here"),
    "cuda-in-cpu": ("cpu/a.cc", "#include <cuda_runtime.h>", "no home here"),
    "to-do-in-comment": ("host/a.cc", "// TODO: later", "open an issue"),
}


@pytest.mark.parametrize(("name", "line", "want"), SEEDED.values(), ids=SEEDED.keys())
def test_seeded_violation_is_found_with_file_rule_and_home(
    tmp_path: Path, name: str, line: str, want: str
) -> None:
    file = tmp_path / name
    file.parent.mkdir()
    file.write_text(f"// A file.\n{line}\n")

    found = broken_rules(tmp_path)

    assert len(found) == 1
    assert found[0].startswith(f"csrc/{name}")
    assert want in found[0]


ALLOWED = {
    "room-below": ("bind/a.cc", '#include "cpu/rank.h"\n#include "contract/build_info.h"'),
    "own-room": ("cpu/a.cc", '#include "cpu/rank.h"\n#include <vector>\n#include <sys/mman.h>'),
    "asm-at-home": ("device/ptx.cuh", 'asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));'),
    "words-in-comments": ("kernels/a.cu", "/* no asm,\n printf(),\n clock64() */ int x;  // asm"),
    "look-alikes": ("device/a.cuh", 'static_assert(1, ""); snprintf(a, 1, "b"); int my_clock;'),
    "printf-on-host": ("host/a.cc", 'printf("%s", name);'),
    "include-in-comment": ("contract/a.h", '// #include "host/b.h"'),
}


@pytest.mark.parametrize(("name", "text"), ALLOWED.values(), ids=ALLOWED.keys())
def test_allowed_code_is_not_reported(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.parent.mkdir()
    file.write_text(text)

    assert broken_rules(tmp_path) == []


# ---- the built module ----


def linked_libraries(module: Path) -> list[str]:
    dynamic = subprocess.run(
        ["readelf", "--dynamic", str(module)], capture_output=True, text=True, check=True
    ).stdout
    return re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf (binutils) was not found")
def test_core_links_neither_torch_nor_nvshmem_nor_a_driver() -> None:
    from ep_comm import _core

    foreign = ("torch", "c10", "nvshmem", "nccl", "cuda", "cudart", "nvidia-ml")
    names = linked_libraries(Path(_core.__file__))

    assert names, "no linked libraries were read"
    assert not [n for n in names if n.startswith(tuple(f"lib{stem}" for stem in foreign))]
