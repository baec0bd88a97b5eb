"""Errors: classes, sentences, pickling, and that docs/errors.md tells of every code."""

from __future__ import annotations

import ast
import copy
import json
import pickle
import re
from pathlib import Path

import pytest

from ep_comm import errors
from ep_comm.errors import CODES, MAX_SENTENCE, EPError, make_error

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
FACTS = {"rank": 2, "peer": 5, "op": "combine", "seq": 90, "tag": "L17"}

EVERY_CODE = pytest.mark.parametrize("code", CODES)


def full_error(code: str) -> EPError:
    return make_error(code, "lost rank 5: signal 9", **FACTS)


# ---- classes ----


@EVERY_CODE
def test_every_code_has_its_class_and_scope(code: str) -> None:
    info = CODES[code]
    error = make_error(code, "did it")
    assert type(error) is info.cls
    assert info.cls is not EPError
    assert info.scope in ("call", "comm", "init", "local")
    assert error.scope == info.scope
    assert info.fix
    assert info.cause


@EVERY_CODE
def test_arguments_are_also_the_builtin_errors_callers_expect(code: str) -> None:
    number, error = int(code[1:]), make_error(code, "did it")
    assert isinstance(error, TypeError) == (number == 200)
    assert isinstance(error, ValueError) == (201 <= number <= 213 or number == 230)
    assert isinstance(error, errors.EPArgumentError) == (200 <= number <= 213)


FAMILIES = {
    "EPTimeout": ["E101", "E102", "E120"],
    "EPPeerDied": ["E110"],
    "EPPeerLeft": ["E111"],
    "EPPeerFault": ["E112"],
    "EPMasked": ["E113"],
    "EPMismatch": ["E220", "E221", "E222"],
    "EPCapacityError": ["E230"],
    "EPMemoryError": ["E231", "E232"],
    "EPCorruption": ["E240", "E241", "E242"],
    "EPClosedError": ["E340"],
    "EPUsageError": ["E301", "E302", "E310", "E311", "E320", "E330", "E340", "E341"],
    "EPEnvironmentError": [f"E40{i}" for i in range(1, 10)],
    "EPFabricError": [f"E50{i}" for i in range(1, 6)],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_catch_their_codes_and_no_others(family: str) -> None:
    cls = getattr(errors, family)
    assert [c for c in CODES if isinstance(make_error(c, "did it"), cls)] == FAMILIES[family]


# ---- sentences ----


def test_sentence_has_its_parts_in_order() -> None:
    assert str(full_error("E110")) == (
        'EPPeerDied[E110]: rank 2 lost rank 5 in combine #90 (tag "L17"): signal 9. '
        "Fix: read its log, close(), rebuild."
    )


def test_sentence_leaves_out_what_is_not_known() -> None:
    assert str(make_error("E340", "is closed: at close()", fix="")) == (
        "EPClosedError[E340]: is closed: at close()."
    )
    assert str(make_error("E202", "rejected x: strides", op="dispatch", fix="copy it")) == (
        "EPArgumentError[E202]: rejected x in dispatch: strides. Fix: copy it."
    )


@pytest.mark.parametrize("part", ["what", "details", "tag"])
@EVERY_CODE
def test_sentence_is_one_line_of_limited_length_and_keeps_its_fix(code: str, part: str) -> None:
    long = "a very long\nstory " * 100
    what = {"what": long, "details": f"lost rank 5: {long}", "tag": "lost rank 5"}[part]
    facts = {**FACTS, "tag": long} if part == "tag" else FACTS
    sentence = str(make_error(code, what, **facts))
    assert len(sentence) == MAX_SENTENCE
    assert "\n" not in sentence
    assert sentence.endswith(f".... Fix: {CODES[code].fix}.")
    assert sentence.startswith(f"{CODES[code].cls.__name__}[{code}]: rank 2 ")


# ---- the same facts for programs ----


@EVERY_CODE
def test_pickled_and_copied_errors_are_the_same(code: str) -> None:
    error = full_error(code)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert twin.as_dict() == error.as_dict()


def test_as_dict_has_stable_keys_and_plain_values() -> None:
    facts = full_error("E110").as_dict()
    assert facts == {
        "class": "EPPeerDied",
        "code": "E110",
        "rank": 2,
        "peer": 5,
        "op": "combine",
        "seq": 90,
        "tag": "L17",
        "fix": "read its log, close(), rebuild",
        "scope": "comm",
        "what": "lost rank 5: signal 9",
    }
    assert json.loads(json.dumps(facts)) == facts
    assert make_error("E200", "did it").as_dict()["class"] == "EPArgumentError"


def test_unknown_code_is_a_bug_and_not_an_error_without_meaning() -> None:
    with pytest.raises(KeyError):
        make_error("E999", "did it")


# ---- docs/errors.md ----

# "### E101: ..." and the line "`EPTimeout`, comm" below it, up to the next heading.
PARAGRAPHS = dict(
    re.findall(r"^### (E\d{3}): .+\n\n((?:.|\n)*?)(?=^##|\Z)", DOCUMENT, re.MULTILINE)
)
RESERVED = {
    code: (cls, scope)
    for code, cls, scope in re.findall(
        r"^\| (E\d{3}) \| `(\w+)` \| (\w+) \|", DOCUMENT, re.MULTILINE
    )
}
QUOTED = re.findall(r"^(EP\w+)\[(E\d{3})\]: (.*)$", DOCUMENT, re.MULTILINE)


def test_document_has_every_code_once() -> None:
    assert sorted([*PARAGRAPHS, *RESERVED]) == sorted(CODES)
    assert list(PARAGRAPHS) == sorted(PARAGRAPHS)


def codes_the_library_raises() -> set[str]:
    """Codes handed to a function as a literal, and those of the native core."""
    enum = re.search(r"enum Code .*?};", (ROOT / "csrc/contract/status.h").read_text(), re.DOTALL)
    assert enum is not None
    found = {f"E{number}" for number in re.findall(r"= (\d{3}),", enum[0])}
    for path in (ROOT / "ep_comm").rglob("*.py"):
        if "doctor" in path.parts:
            continue  # names what a Buffer would raise, raises nothing
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            for value in (*node.args, *(k.value for k in node.keywords)):
                if isinstance(value, ast.Constant) and value.value in CODES:
                    found.add(value.value)
    return found


def test_reserved_codes_are_those_that_nothing_raises() -> None:
    raised = codes_the_library_raises()
    assert not raised & set(RESERVED), "now raised: move it out of the table, write its paragraph"
    assert not set(PARAGRAPHS) - raised, "no longer raised: move it into the table"


@EVERY_CODE
def test_document_has_the_class_and_scope_of_the_code(code: str) -> None:
    info = CODES[code]
    if code in RESERVED:
        assert RESERVED[code] == (info.cls.__name__, info.scope)
        return
    first = PARAGRAPHS[code].partition(".")[0]
    assert f"`{info.cls.__name__}`" in first
    assert re.search(rf"\b{info.scope}\b", first)
    for builtin in (TypeError, ValueError):
        assert (f"`{builtin.__name__}`" in first) == issubclass(info.cls, builtin)


@pytest.mark.parametrize("code", PARAGRAPHS)
def test_paragraph_quotes_its_error_and_says_how_to_confirm_and_what_to_do(code: str) -> None:
    text = PARAGRAPHS[code]
    assert f"\n{CODES[code].cls.__name__}[{code}]: " in text
    assert "Confirm: " in text
    assert " Do: " in text


@pytest.mark.parametrize(("name", "code", "rest"), QUOTED)
def test_quoted_sentences_have_the_form_of_real_ones(name: str, code: str, rest: str) -> None:
    head, _, fix = rest.rpartition(" Fix: ")
    assert name == CODES[code].cls.__name__
    assert head.endswith(".")
    assert fix.endswith(".")
    assert len(f"{name}[{code}]: {rest}") <= MAX_SENTENCE
    assert fix == f"{CODES[code].fix}." or "max_tokens=5" in fix  # one is made for its call
