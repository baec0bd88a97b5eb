"""ep_comm.capabilities() tells the truth: what it lists works, what it does not list is refused."""

from __future__ import annotations

import inspect
import json
import typing

import pytest
import torch

import ep_comm
from ep_comm import Buffer, _core
from ep_comm.backends.choose import BACKENDS
from ep_comm.errors import CODES, EPError


def a_buffer(hidden: int = 512, **options: typing.Any) -> Buffer:
    given = {"num_experts": 2, "num_topk": 1, "max_tokens": 4, "device": "cpu"}
    return Buffer(hidden=hidden, **{**given, **options})


def code_of(call: typing.Callable[[], object]) -> str | None:
    try:
        call()
    except EPError as error:
        return error.code
    return None


@pytest.fixture(scope="module")
def told() -> ep_comm.Capabilities:
    return ep_comm.capabilities()


def test_capabilities_are_plain_values(told: ep_comm.Capabilities) -> None:
    assert json.loads(json.dumps(told)).keys() == told.keys()
    assert set(told) == set(typing.get_type_hints(ep_comm.Capabilities))


def test_limits_are_those_of_the_core(told: ep_comm.Capabilities) -> None:
    assert told["max_topk"] == _core.MAX_TOPK
    assert told["max_ranks"] == _core.MAX_RANKS
    assert told["max_slots"] == _core.MAX_SLOTS
    assert told["row_align_bytes"] == _core.ROW_ALIGN


@pytest.mark.parametrize(
    ("option", "limit", "code"),
    [
        ("num_topk", "max_topk", "E210"),
        ("hidden", "max_hidden", "E211"),
        ("num_slots", "max_slots", "E203"),
    ],
)
def test_options_up_to_the_limit_are_taken(
    told: ep_comm.Capabilities, option: str, limit: str, code: str
) -> None:
    most = told[limit]  # type: ignore[literal-required]
    a_buffer(**{option: most}).close()
    step = 16 if option == "hidden" else 1
    assert code_of(lambda: a_buffer(**{option: most + step})) == code


def test_fewer_slots_than_the_least_are_refused(told: ep_comm.Capabilities) -> None:
    assert code_of(lambda: a_buffer(num_slots=told["min_slots"] - 1)) == "E203"
    a_buffer(num_slots=told["min_slots"]).close()


def test_every_dtype_listed_travels_with_the_hidden_listed(told: ep_comm.Capabilities) -> None:
    topk_idx = torch.zeros((2, 1), dtype=torch.int64)
    assert told["hidden_multiple"].keys() == set(told["dispatch_dtypes"])
    for name, multiple in told["hidden_multiple"].items():
        dtype = getattr(torch, name)
        x = torch.zeros((2, multiple), dtype=torch.uint8).to(dtype)
        with a_buffer(hidden=multiple) as buffer:
            recv = buffer.dispatch(x, topk_idx)
            assert recv.x.dtype == dtype
            refused = code_of(lambda b=buffer, r=recv: b.combine(r.x, r.handle))  # type: ignore[misc]
            assert (refused is None) == (name in told["combine_dtypes"])
        half = multiple // 2
        if half % 4 == 0:
            with a_buffer(hidden=half) as buffer:
                call = lambda b=buffer, t=x: b.dispatch(t[:, : t.shape[1] // 2], topk_idx)  # noqa: E731
                assert code_of(call) == "E211"


def test_every_choice_listed_is_taken_and_no_other(told: ep_comm.Capabilities) -> None:
    x, idx = torch.ones(2, 512), torch.zeros((2, 1), dtype=torch.int64)
    with a_buffer() as buffer:
        for layout in told["layouts"]:
            assert buffer.dispatch(x, idx, layout=layout).layout == layout
        for kind in told["quantize"]:
            for block in told["scale_blocks"]:
                recv = buffer.dispatch(x, idx, quantize=kind, scale_block=block)
                assert recv.scales is not None
        for name in told["index_dtypes"]:
            recv = buffer.dispatch(x, idx.to(getattr(torch, name)))
            assert recv.topk_idx is not None
            assert recv.topk_idx.dtype == getattr(torch, name)
        for name in told["weight_dtypes"]:
            weights = torch.ones((2, 1), dtype=getattr(torch, name))
            assert buffer.dispatch(x, idx, weights).topk_weights is not None
        assert code_of(lambda: buffer.dispatch(x, idx, layout="rows")) == "E203"
        assert code_of(lambda: buffer.dispatch(x, idx, quantize="fp4")) == "E203"
        assert code_of(lambda: buffer.dispatch(x, idx.to(torch.int16))) == "E200"
        assert code_of(lambda: buffer.dispatch(x.double(), idx)) == "E200"


def test_every_backend_has_a_reason_and_the_built_ones_can_be_asked_for(
    told: ep_comm.Capabilities,
) -> None:
    for status in told["backends"].values():
        assert status["reason"]
        assert status["built"] or not status["available"]
    built = {name for name, status in told["backends"].items() if status["built"]}
    unbuilt = {"auto"} if ep_comm.build_info()["cuda"] else {"auto", "nvlink", "hybrid"}
    assert built == {*BACKENDS} - unbuilt


def test_errors_that_name_it_name_a_function_that_exists() -> None:
    assert any("ep_comm.capabilities()" in info.fix for info in CODES.values())


# ---- what type checkers are told of the two verbs ----


@pytest.mark.parametrize("verb", ["dispatch", "combine"])
def test_overloads_have_the_parameters_of_the_method(verb: str) -> None:
    method = getattr(Buffer, verb)
    want = [(p.name, p.kind) for p in inspect.signature(method).parameters.values()]
    for overload in typing.get_overloads(method):
        assert [(p.name, p.kind) for p in inspect.signature(overload).parameters.values()] == want
