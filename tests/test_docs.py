"""Every path that a README or a file in docs/ names in back-ticks or links to exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ep_comm import _core

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("docs", "csrc", "ep_comm", "bench", "tests")
DOCS = sorted([*ROOT.glob("*.md"), *(p for place in PLACES for p in ROOT.glob(f"{place}/**/*.md"))])

# What makes a back-ticked word a path of ours: where it starts, or how it ends.
FOLDERS = {
    *("csrc", "ep_comm", "tests", "bench", "docs", "cmake", "requirements", ".ci"),
    *(
        "contract",
        "device",
        "kernels",
        "transport",
        "host",
        "cpu",
        "bind",
        "plugin",
    ),  # rooms of csrc/
}
ENDINGS = ("py", "pyi", "cc", "h", "cu", "cuh", "md", "toml", "txt", "cmake", "json", "jsonl")
FILES = {"Makefile", "LICENSE", "MANIFEST.in", ".ci/run", ".gitignore", ".clang-format"}

_FENCED = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_TICKED = re.compile(r"`([^`\s]+)`")
_LINK = re.compile(r"\]\(([^)\s#]+)[^)]*\)")


def is_path(word: str) -> bool:
    if not re.fullmatch(r"[\w.*-]+(/[\w.*-]*)*", word):
        return False  # code, an absolute path, a placeholder
    first, slash, _ = word.partition("/")
    _, dot, ending = word.rpartition(".")
    return word in FILES or bool(slash and first in FOLDERS) or bool(dot and ending in ENDINGS)


def exists(word: str, near: Path, root: Path) -> bool:
    """A path may be written from the root, from csrc/ or ep_comm/, or from beside the document."""
    return any(
        any(base.glob(word.rstrip("/"))) for base in (root, root / "csrc", root / "ep_comm", near)
    )


def dead_paths(document: Path, root: Path) -> Iterator[str]:
    text = _FENCED.sub("", document.read_text(encoding="utf-8"))
    name = document.relative_to(root)
    for word in _TICKED.findall(text):
        # A test or a line may follow the file: tests/test_x.py::test_y, csrc/a.cc:12.
        path = re.sub(r":.*$", "", word)
        if is_path(path) and not exists(path, document.parent, root):
            yield f"{name}: `{word}` does not exist"
    for target in _LINK.findall(text):
        local = "://" not in target and not target.startswith("mailto:")
        if local and not (document.parent / target).exists():
            yield f"{name}: the link to {target} leads nowhere"


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_paths_in_document_exist(document: Path) -> None:
    found = list(dead_paths(document, ROOT))
    assert not found, "\n" + "\n".join(found)


# ---- what docs/protocol.md calls by name is in the code, and the other way round ----

_IDENTIFIER = re.compile(r"([A-Za-z_]\w*(?:::\w+)?)(?:\[[^\]]*\])*")


def names_in(text: str) -> set[str]:
    """Back-ticked identifiers: functions, words, regions with their indices."""
    ticked = re.findall(r"`([^`]+)`", _FENCED.sub("", text))
    found = (_IDENTIFIER.fullmatch(word) for word in ticked)
    return {part for match in found if match for part in match[1].split("::")}


def test_names_in_the_protocol_are_in_the_code() -> None:
    files = [p for room in ("csrc", "ep_comm") for p in (ROOT / room).rglob("*.*")]
    code = "\n".join(p.read_text() for p in files if p.suffix[1:] in ("h", "cuh", "cu", "cc", "py"))
    names = names_in((ROOT / "docs/protocol.md").read_text())
    assert {"wait_packed", "arrived", "DispatchOp"} <= names
    assert not [name for name in sorted(names) if name not in code]


def test_regions_of_a_control_block_are_in_the_protocol() -> None:
    names = names_in((ROOT / "docs/protocol.md").read_text())
    regions = [name for name, *_ in _core.ControlLayout(_core.Shape()).regions()]
    assert not [name for name in regions if name not in names]


# ---- the rule itself, over a fake tree ----

FAKE = """
`csrc/host/arena.cc`, `host/arena.cc`, `csrc/*/`, `csrc/host/arena.cc:12` and [docs](docs/a.md#part)
are there. `csrc/host/gone.cc` and `gone.py` and [this](docs/gone.md) are not.
No paths: `x.shape`, `dispatch/combine`, `N/A`, `/dev/shm`, `a.h(1)`, [web](https://example.org/x.md).
```
`csrc/in/a/listing.cc`
```
"""


def test_dead_paths_are_found_and_others_are_not(tmp_path: Path) -> None:
    for name in ("csrc/host/arena.cc", "docs/a.md"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    readme = tmp_path / "README.md"
    readme.write_text(FAKE)

    assert list(dead_paths(readme, tmp_path)) == [
        "README.md: `csrc/host/gone.cc` does not exist",
        "README.md: `gone.py` does not exist",
        "README.md: the link to docs/gone.md leads nowhere",
    ]
