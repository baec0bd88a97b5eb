"""ep_comm/_core.pyi says what csrc/bind binds: names, kinds, parameters, defaults and results.

pybind11 writes each signature into the docstring; that is read here and compared with the stub.
Parameter types are left to mypy and to the calls in the tests.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import ep_comm

STUB = Path(ep_comm.__file__).parent / "_core.pyi"
# Result types that are spelled alike on both sides. Others (arrays, capsules) are not compared.
PLAIN = {"None", "bool", "int", "float", "str", "bytes", "list", "dict", "tuple"}


class Member(NamedTuple):
    kind: str  # class, function, value (readable and writable), read-only
    params: tuple[str, ...] = ()  # without self; "name=" has a default, "*" has no name
    result: str = ""  # empty when it is not compared


Members = dict[str, Member]

# Bound by csrc/bind/bind_cuda.cc, so not by a build without CUDA.
CUDA_ONLY = {
    "DeviceCallError",
    "DeviceMemory",
    "StreamHold",
    "DeviceArena",
    "Flight",
    "DeviceRank",
    "is_capturing",
    "release_dropped",
    "BesideCaptures",
}


def is_public(name: str) -> bool:
    return name == "__init__" or not name.startswith("_")


def plain_result(text: str, classes: set[str]) -> str:
    """The result's type without its parameters, when both sides spell it alike."""
    name = text.removeprefix("ep_comm._core.").partition("[")[0].strip("\"' ")
    return name if name in PLAIN | classes else ""


# ---- the binding ----


def split_at_commas(text: str) -> list[str]:
    """Split parameters at the commas outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "([{<":
            depth += 1
        elif char in ")]}>":
            depth -= 1
        if char == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def bound_param(text: str) -> str:
    name = re.match(r"\*{0,2}\w+", text)
    assert name is not None, f"cannot read parameter {text!r}"
    unnamed = re.fullmatch(r"arg\d+", name[0]) is not None
    outside = text  # of brackets, which may hold a "=" of their own
    while (less := re.sub(r"\[[^\[\]]*\]", "", outside)) != outside:
        outside = less
    return ("*" if unnamed else name[0]) + ("=" if "=" in outside else "")


def bound_function(doc: str, kind: str, classes: set[str]) -> Member:
    signature = re.match(r"\w*\((?P<params>.*)\) -> (?P<result>.+)$", doc.strip().splitlines()[0])
    assert signature is not None, f"cannot read signature {doc!r}"
    params = [p for p in split_at_commas(signature["params"]) if p not in ("/", "*")]
    if params and re.match(r"self\b|arg0: ep_comm\._core\.", params[0]):
        params = params[1:]
    result = plain_result(signature["result"], classes)
    return Member(kind, tuple(bound_param(p) for p in params), result)


def bound_class(cls: type, classes: set[str]) -> Members:
    members: Members = {}
    for name, value in vars(cls).items():
        if not is_public(name) or type(value).__name__ == "wrapper_descriptor":
            continue  # the latter: no constructor from Python
        if isinstance(value, property) or type(value).__name__ == "pybind11_static_property":
            kind = "read-only" if value.fset is None else "value"
            doc = getattr(value.fget, "__doc__", None) or ""
            result = plain_result(doc.strip().rpartition("-> ")[2], classes)
            members[name] = Member(kind, (), result)
        elif callable(value) or isinstance(value, staticmethod):
            doc = getattr(cls, name).__doc__ or ""
            members[name] = bound_function(doc, "function", classes)
        else:
            members[name] = Member("value", (), plain_result(type(value).__name__, classes))
    return members


def binding_of(module: ModuleType) -> dict[str, Members | Member]:
    public = {name: value for name, value in vars(module).items() if is_public(name)}
    classes = {name for name, value in public.items() if isinstance(value, type)}
    found: dict[str, Members | Member] = {}
    for name, value in public.items():
        if isinstance(value, type):
            found[name] = bound_class(value, classes) if not issubclass(value, Exception) else {}
        elif callable(value):
            found[name] = bound_function(value.__doc__ or "", "function", classes)
        else:
            found[name] = Member("value", (), plain_result(type(value).__name__, classes))
    return found


# ---- the stub ----


def stub_function(node: ast.FunctionDef, classes: set[str], *, drop_self: bool) -> Member:
    args = node.args
    names = [*args.posonlyargs, *args.args]
    first_default = len(names) - len(args.defaults)
    params = [n.arg + ("=" if i >= first_default else "") for i, n in enumerate(names)]
    keywords = zip(args.kwonlyargs, args.kw_defaults, strict=True)
    params += [n.arg + ("=" if default is not None else "") for n, default in keywords]
    assert node.returns is not None, f"line {node.lineno}: {node.name} has no result type"
    result = plain_result(ast.unparse(node.returns), classes)
    return Member("function", tuple(params[1:] if drop_self else params), result)


def stub_value(node: ast.AnnAssign, classes: set[str]) -> Member:
    text = re.sub(r"^(typing\.)?(Final|ClassVar)\b\[?", "", ast.unparse(node.annotation))
    return Member("value", (), plain_result(text.rstrip("]"), classes))


def stub_class(node: ast.ClassDef, classes: set[str]) -> Members:
    members: Members = {}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            members[item.target.id] = stub_value(item, classes)
        elif isinstance(item, ast.FunctionDef) and is_public(item.name):
            decorators = {ast.unparse(d) for d in item.decorator_list}
            if "property" in decorators:
                assert item.returns is not None
                result = plain_result(ast.unparse(item.returns), classes)
                members[item.name] = Member("read-only", (), result)
            elif f"{item.name}.setter" in decorators:
                members[item.name] = members[item.name]._replace(kind="value")
            else:
                static = "staticmethod" in decorators
                members[item.name] = stub_function(item, classes, drop_self=not static)
    return members


def stub_of(text: str) -> dict[str, Members | Member]:
    tree = ast.parse(text)
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    found: dict[str, Members | Member] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and is_public(node.name):
            found[node.name] = stub_class(node, classes)
        elif isinstance(node, ast.FunctionDef) and is_public(node.name):
            found[node.name] = stub_function(node, classes, drop_self=False)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = stub_value(node, classes)
    return {name: value for name, value in found.items() if is_public(name)}


# ---- compared ----


def same_member(stub: Member, bound: Member) -> bool:
    params = len(stub.params) == len(bound.params) and all(
        ours == theirs or (theirs.startswith("*") and ours.endswith("=") == theirs.endswith("="))
        for ours, theirs in zip(stub.params, bound.params, strict=True)
    )
    results = not stub.result or not bound.result or stub.result == bound.result
    return stub.kind == bound.kind and params and results


def differences(stub: dict[str, Any], bound: dict[str, Any], where: str = "") -> list[str]:
    """What one side says and the other does not, a sentence each."""
    found = [f"{where}{name} is bound, _core.pyi lacks it" for name in bound.keys() - stub.keys()]
    found += [f"{where}{name} is in _core.pyi, not bound" for name in stub.keys() - bound.keys()]
    for name in stub.keys() & bound.keys():
        ours, theirs = stub[name], bound[name]
        if isinstance(ours, dict) and isinstance(theirs, dict):
            found += differences(ours, theirs, f"{where}{name}.")
        elif isinstance(ours, dict) or isinstance(theirs, dict) or not same_member(ours, theirs):
            found.append(f"{where}{name}: _core.pyi says {ours}, bound is {theirs}")
    return sorted(found)


def test_stub_matches_the_binding() -> None:
    from ep_comm import _core

    stub = stub_of(STUB.read_text(encoding="utf-8"))
    if not _core.BUILD["cuda"]:
        stub = {name: value for name, value in stub.items() if name not in CUDA_ONLY}
    found = differences(stub, binding_of(_core))
    assert not found, "\n" + "\n".join(found)


# ---- the comparison itself ----

FAKE_STUB = """
LIMIT: Final[int]
class Shape:
    num_ranks: int
    @property
    def end(self) -> int: ...
    def __init__(self, num_ranks: int = 1) -> None: ...
    @staticmethod
    def make(size: int) -> Shape: ...
def run(shape: Shape, late: Callable[[int], None] | None = None) -> list[int]: ...
"""
FAKE_BINDING: dict[str, Any] = {
    "LIMIT": Member("value", (), "int"),
    "Shape": {
        "num_ranks": Member("value", (), "int"),
        "end": Member("read-only", (), "int"),
        "__init__": Member("function", ("num_ranks=",), "None"),
        "make": Member("function", ("*",), "Shape"),
    },
    "run": Member("function", ("shape", "late="), "list"),
}


def test_equal_stub_and_binding_have_no_differences() -> None:
    assert differences(stub_of(FAKE_STUB), FAKE_BINDING) == []


def test_seeded_differences_are_found() -> None:
    bound = {
        **FAKE_BINDING,
        "Shape": {**FAKE_BINDING["Shape"], "end": Member("value", (), "int")},
        "run": Member("function", ("shape", "late"), "list"),
        "extra": Member("value"),
    }
    del bound["LIMIT"]

    found = differences(stub_of(FAKE_STUB), bound)

    assert [line.split()[0].rstrip(":") for line in found] == ["LIMIT", "Shape.end", "extra", "run"]


def test_docstring_signature_is_read_to_names_defaults_and_result() -> None:
    doc = (
        "f(self: ep_comm._core.A, arg0: SupportsInt, b: abc.Callable[[int, int], None] = None,"
        " c: Annotated[Sequence[int], 'FixedSize(=2)'], d: list[int] = [0, 0], e: str = ',)')"
        " -> ep_comm._core.A\n\nText."
    )
    want = Member("function", ("*", "b=", "c", "d=", "e="), "A")
    assert bound_function(doc, "function", {"A"}) == want
