"""Hostile inputs: handshakes, handles and arguments. Only an EPError may come out, in time, and the
next call works; a handle whose rows were changed may cost the communicator (E242), and no more.

A few thousand inputs in CI. A hundred thousand:

    python -m pytest --slow -k long tests/test_fuzz.py

Records that peers write into shared memory are attacked in tests/cpp/hostile_test.cc, under the
sanitizers.
"""

from __future__ import annotations

import inspect
import operator
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from patience import PATIENT

from ep_comm import Buffer, EPConfig, Handle, StoreGroup, autograd
from ep_comm.backends import mapping
from ep_comm.bootstrap import Exchange, Group, Hello, Listener, check_agreement
from ep_comm.errors import EPError
from ep_comm.testing import Cluster

HIDDEN, EXPERTS, TOPK, TOKENS = 16, 4, 2, 4
SHAPE: dict[str, Any] = {
    "num_experts": EXPERTS, "num_topk": TOPK, "hidden": HIDDEN, "max_tokens": TOKENS,
    "arena_bytes": 1 << 20, "config": PATIENT,
}  # fmt: skip
SLOW_S = 30.0  # less than the clocks: a call that took so long waited for somebody who never came

NUMBERS = [
    -(2**70), -(2**63), -(2**31) - 1, -(2**31), -3, -2, -1, 0, 1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 33,
    127, 128, 129, 1000, 4096, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63,
    2**70,
]  # fmt: skip


def short(inputs: int) -> Callable[[Any], Any]:
    """A run for every commit; `long` below repeats it with many more inputs."""
    slow_draws = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    phases = [Phase.explicit, Phase.generate]  # no shrinking: buffers live on from input to input
    return settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=slow_draws,
    )


# ---- values ----


class Rudeness(Exception):
    """Raised by the caller's own object: it comes back to the caller, and peers are told."""


class Rude:
    """An object that answers every question with an exception."""

    def _no(self, *args: Any, **options: Any) -> Any:
        raise Rudeness("no")

    __bool__ = __len__ = __iter__ = __index__ = __int__ = __float__ = __eq__ = __lt__ = _no
    __str__ = __repr__ = __call__ = __dlpack__ = __dlpack_device__ = __getitem__ = __hash__ = _no


class Liar:
    """Looks like an array and is none."""

    shape, dtype, ndim, device = (4, 16), torch.float32, 2, torch.device("cpu")

    def __dlpack__(self, **options: Any) -> Any:
        return object()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


DTYPES = [
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8,
    torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2,
]  # fmt: skip
SIZES = st.sampled_from([0, 1, 2, 3, TOKENS, TOKENS + 1, 8, HIDDEN, 17, 31, 32, 33])
SHAPES = st.one_of(
    st.sampled_from(
        [(TOKENS, HIDDEN), (TOKENS, TOPK), (0, HIDDEN), (0, TOPK), (3, HIDDEN), (3, TOPK), (8,)]
    ),
    st.lists(SIZES, max_size=4).map(tuple),
)


@st.composite
def tensors(draw: Any) -> Any:
    """Any dtype, shape, strides, kind; the values are hostile, too."""
    shape, dtype = draw(SHAPES), draw(st.sampled_from(DTYPES))
    count = int(np.prod(shape, dtype=np.int64)) if shape else 1
    number = draw(st.sampled_from(NUMBERS))
    fill = max(-(2**62), min(number, 2**62))
    if dtype.is_floating_point:
        values = torch.full((count,), float(draw(st.floats(width=32))), dtype=torch.float32)
    else:
        values = torch.full((count,), fill, dtype=torch.int64)
        if draw(st.booleans()):
            values = torch.arange(count) % (EXPERTS + 2) - 1
    tensor = values.to(dtype).reshape(shape)
    match draw(st.sampled_from(["plain"] * 6 + list(KINDS))):
        case "plain":
            return tensor
        case kind:
            try:
                return KINDS[kind](tensor)
            except Exception:  # this dtype or shape cannot be made so
                return tensor


KINDS: dict[str, Callable[[Any], Any]] = {
    "transposed": lambda t: t.transpose(0, -1),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "every-second-row": lambda t: torch.cat([t, t])[::2],
    "expanded": lambda t: t[:1].expand(t.shape),
    "shifted": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].reshape(t.shape),
    "sparse": lambda t: t.to_sparse(),
    "sparse-csr": lambda t: t.to_sparse_csr(),
    "meta": lambda t: t.to("meta"),
    "grad": lambda t: t.requires_grad_(),
    "negated": lambda t: torch._neg_view(t),
    "conjugate": lambda t: t.to(torch.complex64).conj(),
    "parameter": lambda t: torch.nn.Parameter(t),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "mkldnn": lambda t: t.to_mkldnn(),
    "numpy": lambda t: t.numpy(),
    "numpy-readonly": lambda t: np.frombuffer(t.numpy().tobytes(), t.numpy().dtype),
    "numpy-reversed": lambda t: t.numpy()[::-1],
    "numpy-object": lambda t: t.numpy().astype(object),
    "numpy-big-endian": lambda t: t.numpy().astype(">i4"),
    "list": lambda t: t.tolist(),
    "inference": lambda t: torch.inference_mode()(lambda: t.clone())(),
}

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=8),
    st.sampled_from(["compact", "grouped", "slab", "fp8", "fp8_ue8m0", "auto", "arena", "torch"]),
    st.sampled_from(["rank", "topk", "cpu", "cuda", "meta", "collective", "cuda:99", "a" * 1000]),
    st.sampled_from(
        [torch.float32, torch.strided, torch.device("meta"), torch.Size([1]), Ellipsis]
    ),
    st.sampled_from(
        [np.int64(3), np.float32(1.5), np.bool_(True), 1j, object, print, float("nan")]
    ),
    st.builds(Rude),
    st.builds(Liar),
    st.builds(object),
)
ANYTHING = st.one_of(
    SCALARS,
    tensors(),
    st.lists(st.one_of(SCALARS, tensors()), max_size=9),
    st.lists(st.one_of(SCALARS, tensors()), max_size=3).map(tuple),
    st.dictionaries(st.text(max_size=3), SCALARS, max_size=2),
)


# ---- what an attack must come to ----


def attack(call: Callable[[], Any]) -> EPError | None:
    """Run it. The EPError it raised, None when it went well; everything else is a finding."""
    start = time.monotonic()
    error: EPError | None = None
    try:
        call()
    except EPError as raised:
        error = raised
    except Rudeness:
        pass
    assert time.monotonic() - start < SLOW_S, "waited for something that never comes"
    if error is not None:
        assert len(str(error)) <= 400
        assert "\n" not in str(error)
        assert error.as_dict()["code"] == error.code
    return error


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.arange(TOKENS * HIDDEN, dtype=torch.float32).reshape(TOKENS, HIDDEN)
    ids = torch.tensor([[0, 3], [1, -1], [2, 2], [-1, -1]])
    return x, ids, torch.ones(TOKENS, TOPK)


def still_works(buffer: Buffer) -> None:
    """One exact round trip."""
    x, ids, weights = inputs()
    recv = buffer.dispatch(x, ids, weights, layout="grouped")
    out = buffer.combine(recv.x.clone(), recv.handle)
    assert torch.equal(out, x * torch.tensor([2.0, 1.0, 2.0, 0.0])[:, None])


class Home:
    """Buffers that live through many attacks, and are built anew when one was lost."""

    def __init__(self, num_ranks: int) -> None:
        self.cluster = Cluster(1, num_ranks)
        self.cluster.make_buffers(**SHAPE)

    @property
    def buffer(self) -> Buffer:
        return self.cluster.buffers[0]

    def rebuild(self) -> None:
        self.cluster.close()
        self.cluster.make_buffers(**SHAPE)


@pytest.fixture(scope="module")
def one() -> Iterator[Home]:
    """A rank by itself: nobody else can be blamed."""
    home = Home(1)
    yield home
    home.cluster.close()


@pytest.fixture(scope="module")
def two() -> Iterator[Home]:
    home = Home(2)
    yield home
    home.cluster.close()


# ---- handshakes ----

FORMAT = Hello._format()
_CODES = [f.metadata["fmt"] for f in fields(Hello)]


@st.composite
def handshakes(draw: Any) -> bytes:
    """From noise to a struct whose checksum is right and whose fields are nonsense."""
    match draw(st.integers(0, 4)):
        case 0:
            return bytes(draw(st.binary(max_size=600)))
        case 1:  # right head, random body of any length
            body = draw(st.binary(max_size=2 * FORMAT.size))
        case 2:  # right length
            body = draw(st.binary(min_size=FORMAT.size, max_size=FORMAT.size))
        case 3:  # an honest one with some bytes changed
            raw = bytearray(Hello(rank=draw(st.integers(0, 3)), version="0.1").pack())
            for _ in range(draw(st.integers(1, 4))):
                raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
            return bytes(raw[: draw(st.integers(0, len(raw) + 1))])
        case _:  # every field in its own form
            body = b"".join(draw(_field(fmt)) for fmt in _CODES)
    return struct.pack("<8sII", b"EPHELLO1", len(body), zlib.crc32(body)) + body


def _field(fmt: str) -> st.SearchStrategy[bytes]:
    if fmt.endswith("s"):
        size = int(fmt[:-1])
        texts = [b"", b"0.1", b"cpu", b"E203 x", b"E999", b"E110 " * 9, b"\xff" * size]
        return st.one_of(
            st.sampled_from([text[:size].ljust(size, b"\0") for text in texts]),
            st.binary(min_size=size, max_size=size),
        )
    bits = 8 * struct.calcsize("<" + fmt)
    low, high = (0, 2**bits - 1) if fmt.isupper() else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return st.one_of(st.sampled_from([0, 1, 2, high, low]), st.integers(low, high)).map(
        lambda number: struct.pack("<" + fmt, number)
    )


def handshake_is_parsed_or_refused(data: list[bytes]) -> None:
    hellos = []
    for rank, raw in enumerate(data):
        hello = Hello(rank=rank)
        error = attack(lambda raw=raw, rank=rank: hellos.append(Hello.unpack(raw, rank)))
        if error is not None:
            assert error.code in ("E406", "E222")
            hellos.append(hello)
    attack(lambda: check_agreement(0, hellos))
    for hello in hellos:
        assert len(repr(hello)) > 0
        hello.same_process(hellos[0])


class Answers:
    """A store in which every other rank has said `answer`, whatever was asked."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.own: dict[str, bytes] = {}

    def add(self, key: str, amount: int) -> int:
        return 1

    def set(self, key: str, value: bytes) -> None:
        self.own[key] = value

    def check(self, keys: list[str]) -> bool:
        return True

    def get(self, key: str) -> bytes:
        return self.own.get(key, self.answer)

    def delete_key(self, key: str) -> None:
        self.own.pop(key, None)


def answer_of_a_peer_is_read_or_refused(answer: bytes) -> None:
    """The last rounds of a construction carry a code and a sentence."""
    exchange = Exchange(Group(Answers(answer), 0, 3), 1.0)
    error = attack(lambda: mapping.agree(exchange, "created", 0, None))
    assert error is not None or answer == b""
    failure = exchange.failure()  # the same bytes as the note of a rank that failed
    assert failure is None or (failure.code in ("E110", "E111") and failure.peer in (1, 2))


def greeting_is_never_believed(data: bytes) -> None:
    import socket

    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        assert Listener._greet(ours, b"g" * 16, {1, 2}) is None


# ---- handles ----

HONEST: dict[tuple[int, str, bool], Any] = {}
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"layout": "grouped", "alignment": 4},
    {"layout": "slab"},
    {"sync": False},
    {"layout": "grouped", "sync": False},
]


@st.composite
def damages(draw: Any) -> Callable[[Handle], Any]:
    """What is done to a handle: a value, a tensor, or all of it."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        whatever = draw(ANYTHING)
        return lambda handle: whatever
    if kind == 1:
        length = draw(st.integers(0, 10))
        return lambda handle: (list(handle) * 2)[:length]
    field = draw(st.sampled_from(Handle._fields))
    if kind == 2:
        whatever = draw(ANYTHING)
        return lambda handle: handle._replace(**{field: whatever})
    if kind == 3:
        tensor = draw(tensors())
        return lambda handle: tuple(handle._replace(**{field: tensor}))
    places = draw(st.lists(st.integers(0, 63), min_size=1, max_size=4))
    numbers = draw(st.lists(st.sampled_from(NUMBERS), min_size=4, max_size=4))
    whole = draw(st.integers(0, 9)) == 0

    def overwrite(handle: Handle) -> Any:
        copies = [t.clone() for t in handle]
        target = copies[Handle._fields.index(field)]
        if target.numel() == 0:
            target = copies[0]
        flat = target.view(-1)
        limits = torch.iinfo(torch.int32 if flat.dtype == torch.float32 else flat.dtype)
        for place, number in zip(places, numbers, strict=False):
            fits = max(limits.min, min(number, limits.max))
            flat[place % len(flat)] = fits
            if whole:
                flat.fill_(fits)
        return Handle(*copies) if draw_tuple else tuple(copies)

    draw_tuple = draw(st.booleans())
    return overwrite


def hostile_handle_is_refused_or_used(home: Home, layout: int, damage: Any, weights: bool) -> None:
    x, ids, w = inputs()
    buffer = home.buffer
    recv = buffer.dispatch(x, ids, w, **LAYOUTS[layout])
    y, back = recv.x.clone(), recv.topk_weights if weights else None
    handle = damage(recv.handle)
    for call in (
        lambda: buffer.combine(y, handle, topk_weights=back),
        lambda: buffer.dispatch(x, handle=handle, topk_weights=w if weights else None),
        buffer.check,
    ):
        error = attack(call)
        if error is not None and error.scope == "comm":
            assert error.code == "E242", error
            home.rebuild()
            return


# ---- arguments ----

DISPATCH = [
    "x", "topk_idx", "topk_weights", "scales", "scale_block", "quantize", "handle", "layout",
    "alignment", "row_index", "origins", "capacity", "sync", "wait", "output",
    "recv_stats", "wait_stats", "num_sms", "tag",
]  # fmt: skip
COMBINE = [
    "x", "handle", "weighted", "topk_weights", "sum_weights", "order", "per_rank", "row_weights",
    "bias", "out", "wait", "wait_stats", "num_sms", "tag",
]  # fmt: skip
NATIVE = ("origins", "sum_weights", "out", "recv_stats", "wait_stats")  # differentiable calls lack
BUFFER = [
    "num_experts", "num_topk", "hidden", "max_tokens", "num_slots", "expert_map", "backend",
    "device", "arena_bytes", "num_sms", "config",
]  # fmt: skip


def changes(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    """One to three parameters, each anything."""
    return st.dictionaries(st.sampled_from(names), ANYTHING, min_size=1, max_size=3)


def settle(result: Any) -> None:
    """`wait` may have been anything, too."""
    if hasattr(result, "wait"):
        result.wait()


def affordable(change: dict[str, Any]) -> bool:
    """Static shapes of what the caller asked for are made, however large; that is no attack."""
    static = "sync" in change and not _true(change["sync"])
    sized = [change[name] for name in ("capacity", "alignment") if name in change]
    return not static or not any(isinstance(s, int) and 2**16 < s < 2**31 for s in sized)


def _true(value: Any) -> bool:
    try:
        return bool(value)
    except Exception:
        return False


def hostile_dispatch_is_refused_or_done(buffer: Buffer, change: dict[str, Any]) -> None:
    x, ids, weights = inputs()
    options = {"x": x, "topk_idx": ids, "topk_weights": weights, **change}
    if affordable(change):
        attack(lambda: settle(buffer.dispatch(**options)))
        attack(buffer.check)


def hostile_combine_is_refused_or_done(buffer: Buffer, layout: int, change: dict[str, Any]) -> None:
    x, ids, weights = inputs()
    recv = buffer.dispatch(x, ids, weights, **LAYOUTS[layout])
    options = {"x": recv.x.clone(), "handle": recv.handle, **change}
    attack(lambda: settle(buffer.combine(**options)))


def hostile_options_are_refused_or_taken(change: dict[str, Any]) -> None:
    options = {**SHAPE, "device": "cpu", **change}

    def build() -> None:
        with Buffer(**options):
            pass

    attack(build)


def hostile_call_of_a_peer_ends_everywhere(
    two: Home, culprit: int, change: dict[str, Any], combine: bool, recorded: bool
) -> None:
    """One rank's nonsense: both ranks come back, and both come back usable.

    Args:
        recorded: through ep_comm.autograd, of tensors with gradients.
    """

    def work(rank: int) -> str:
        buffer = two.cluster.buffers[rank]
        x, ids, weights = inputs()
        recv = buffer.dispatch(x, ids, weights)
        if combine:
            options: dict[str, Any] = {"x": recv.x.clone(), "handle": recv.handle}
            call: Callable[..., Any] = buffer.combine
        else:
            options = {"x": x, "topk_idx": ids, "topk_weights": weights}
            call = buffer.dispatch
        if recorded:
            call = partial(autograd.combine if combine else autograd.dispatch, buffer)
            options["x"].requires_grad_()
        if rank == culprit:
            options |= change
        error = attack(lambda: settle(call(**options)))
        attack(buffer.check)
        return "ok" if error is None else error.code

    codes = two.cluster.run(work)
    assert not [c for c in codes if c.startswith(("E1", "E24", "E33"))], codes


# ---- short runs ----


@short(600)
@given(st.lists(handshakes(), min_size=1, max_size=4))
def test_hostile_handshakes_are_e406_or_a_disagreement(data: list[bytes]) -> None:
    handshake_is_parsed_or_refused(data)


@short(300)
@given(
    st.one_of(
        st.binary(max_size=400),
        st.sampled_from([b"E110 x", b"E203", b"E232 \n", b"\xff", b"E111 1 x", b"E110 0", b"E9 2"]),
    )
)
def test_hostile_answers_in_the_store_are_refused(answer: bytes) -> None:
    answer_of_a_peer_is_read_or_refused(answer)


@short(200)
@given(st.binary(max_size=100))
def test_hostile_greetings_are_refused(data: bytes) -> None:
    greeting_is_never_believed(data)


@short(600)
@given(layout=st.integers(0, len(LAYOUTS) - 1), damage=damages(), weights=st.booleans())
def test_hostile_handles_on_one_rank(one: Home, layout: int, damage: Any, weights: bool) -> None:
    hostile_handle_is_refused_or_used(one, layout, damage, weights)
    still_works(one.buffer)


@short(600)
@given(change=changes(DISPATCH))
def test_hostile_arguments_of_dispatch(one: Home, change: dict[str, Any]) -> None:
    hostile_dispatch_is_refused_or_done(one.buffer, change)
    still_works(one.buffer)


@short(400)
@given(layout=st.integers(0, len(LAYOUTS) - 1), change=changes(COMBINE))
def test_hostile_arguments_of_combine(one: Home, layout: int, change: dict[str, Any]) -> None:
    hostile_combine_is_refused_or_done(one.buffer, layout, change)
    still_works(one.buffer)


@short(300)
@given(change=changes(BUFFER))
def test_hostile_options_of_a_buffer(change: dict[str, Any]) -> None:
    hostile_options_are_refused_or_taken(change)


@short(150)
@given(culprit=st.integers(0, 1), change=changes(DISPATCH))
def test_hostile_dispatch_of_one_rank_ends_on_both(
    two: Home, culprit: int, change: dict[str, Any]
) -> None:
    if affordable(change):
        hostile_call_of_a_peer_ends_everywhere(two, culprit, change, combine=False, recorded=False)


@short(150)
@given(culprit=st.integers(0, 1), change=changes(COMBINE))
def test_hostile_combine_of_one_rank_ends_on_both(
    two: Home, culprit: int, change: dict[str, Any]
) -> None:
    hostile_call_of_a_peer_ends_everywhere(two, culprit, change, combine=True, recorded=False)


@short(150)
@given(culprit=st.integers(0, 1), change=changes([n for n in DISPATCH if n not in NATIVE]))
def test_hostile_differentiable_dispatch_of_one_rank_ends_on_both(
    two: Home, culprit: int, change: dict[str, Any]
) -> None:
    if affordable(change):
        hostile_call_of_a_peer_ends_everywhere(two, culprit, change, combine=False, recorded=True)


@short(150)
@given(
    culprit=st.integers(0, 1),
    change=changes([n for n in COMBINE if n not in (*NATIVE, "wait")]),
)
def test_hostile_differentiable_combine_of_one_rank_ends_on_both(
    two: Home, culprit: int, change: dict[str, Any]
) -> None:
    hostile_call_of_a_peer_ends_everywhere(two, culprit, change, combine=True, recorded=True)


@short(300)
@given(shape=ANYTHING, dtype=st.one_of(st.sampled_from(DTYPES), ANYTHING))
def test_hostile_shapes_of_empty(one: Home, shape: Any, dtype: Any) -> None:
    attack(lambda: one.buffer.empty(shape, dtype))
    still_works(one.buffer)


@short(200)
@given(st.dictionaries(st.sampled_from([f.name for f in fields(EPConfig)]), SCALARS))
def test_hostile_clocks(change: dict[str, Any]) -> None:
    attack(lambda: EPConfig(**change))


def _index(value: Any) -> int:
    try:
        return operator.index(value)
    except Exception:
        return 0


@short(200)
@given(store=SCALARS, rank=ANYTHING, size=ANYTHING, name=SCALARS)
def test_hostile_groups(store: Any, rank: Any, size: Any, name: Any) -> None:
    import torch.distributed as dist

    good = dist.HashStore()
    for group in (StoreGroup(good, rank, 1), StoreGroup(good, 0, size), StoreGroup(store, 0, 1)):
        if group.size is size and _index(size) > 1:
            continue  # that many ranks really might come
        attack(lambda group=group: Buffer(group, **SHAPE, device="cpu").close())


@pytest.mark.parametrize("name", ["dispatch", "combine"])
def test_unknown_keywords_are_a_type_error_and_peers_need_not_wait(one: Home, name: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        getattr(one.buffer, name)(torch.ones(1, HIDDEN), torch.zeros(1, 1).long(), sycn=True)
    still_works(one.buffer)


def test_reversed_array_is_refused_and_does_not_end_the_process(one: Home) -> None:
    """torch 2.13 calls abort() for a DLPack array with a negative stride."""
    x, ids, _ = inputs()
    error = attack(lambda: one.buffer.dispatch(x.numpy()[::-1], ids))
    assert error is not None
    assert error.code == "E202"


# ---- the long run ----

LONG = {
    "handshakes": (40_000, test_hostile_handshakes_are_e406_or_a_disagreement),
    "handles": (25_000, test_hostile_handles_on_one_rank),
    "dispatch": (20_000, test_hostile_arguments_of_dispatch),
    "combine": (10_000, test_hostile_arguments_of_combine),
    "options": (3_000, test_hostile_options_of_a_buffer),
    "dispatch-two": (1_500, test_hostile_dispatch_of_one_rank_ends_on_both),
    "combine-two": (1_500, test_hostile_combine_of_one_rank_ends_on_both),
    "dispatch-ops": (1_500, test_hostile_differentiable_dispatch_of_one_rank_ends_on_both),
    "combine-ops": (1_500, test_hostile_differentiable_combine_of_one_rank_ends_on_both),
}
assert sum(inputs for inputs, _ in LONG.values()) >= 100_000


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("target", LONG)
def test_long_run(target: str, one: Home, two: Home) -> None:
    inputs, test = LONG[target]
    body, strategies = test.hypothesis.inner_test, test.hypothesis._given_kwargs
    homes = {"one": one, "two": two}
    fixed = {name: homes[name] for name in inspect.signature(body).parameters if name in homes}
    short(inputs)(given(**strategies)(body))(**fixed)
