"""Construction of a Buffer: options are checked, ranks agree on everything that must be equal, and
the backend they choose connects them. All ranks succeed, or all raise and keep nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ep_comm import _core
from ep_comm.backends.base import Backend
from ep_comm.backends.choose import BACKENDS, choose, instead_of_gpu
from ep_comm.backends.nodes import find_nodes
from ep_comm.bootstrap import (
    Exchange,
    Group,
    Hello,
    Listener,
    check_agreement,
    group_token,
    host_identity,
)
from ep_comm.checks import BufferSpec, check_options, one_of, positive
from ep_comm.config import EPConfig
from ep_comm.errors import EPError, EPTimeout, make_error, shown
from ep_comm.masks import MOST_RANKS


class Constructed(NamedTuple):
    spec: BufferSpec
    backend: Backend
    reason: str  # why it is this backend


def construct(
    group: Group,
    config: object,
    *,
    backend: Any,
    device: Any,
    arena_bytes: Any,
    num_sms: Any,
    ranks_per_node: Any,
    **sizes: Any,
) -> Constructed:
    """What `Buffer(...)` does; its arguments as they were given.

    Args:
        sizes: num_experts, num_topk, hidden, max_tokens, num_slots, expert_map.
    Raises:
        EPError: E203, E210 to E212, E221, E222, E232 or E4xx, the same on all ranks; a rank whose
            own arguments are bad tells the others. EPTimeout: E120. EPPeerDied: E110.

    Collective.
    """
    me = group.rank
    usable = config if isinstance(config, EPConfig) else EPConfig()
    exchange = Exchange(group, usable.arrival_s)
    try:
        if not isinstance(config, EPConfig | None):
            raise make_error("E203", f"rejected config={shown(config)}: want an EPConfig")
        target = _device(device)
        one_of("backend", backend, BACKENDS)
        if ranks_per_node is not None:
            positive("ranks_per_node", ranks_per_node, maximum=group.size)
        spec = check_options(
            me, group.size, device=target, arena_bytes=arena_bytes, num_sms=num_sms, **sizes
        )
        if usable.masking and group.size > MOST_RANKS:
            raise make_error("E212", f"rejected {group.size} ranks: limit {MOST_RANKS} with masks")
        host = host_identity()
        listener = Listener()
    except EPError as error:
        refusal = f"{error.code} {error.what}"
        exchange.publish("hello", Hello(rank=me, refusal=refusal).pack())
        raise make_error(error.code, error.what, rank=me, fix=error.fix) from None
    except BaseException as error:
        code = "E203" if isinstance(error, Exception) else "E111"
        refusal = f"{code} raised {shown(error)}"
        with contextlib.suppress(Exception):  # of the store; the first one is to be seen
            exchange.publish("hello", Hello(rank=me, refusal=refusal).pack())
        raise
    try:
        with contextlib.closing(listener):
            hello = _hello(
                spec, backend, ranks_per_node, group.members, host, listener.token,
                paranoid=usable.paranoid, masking=usable.masking, direct=usable.direct,
            )  # fmt: skip
            opened, reason = _open_backend(
                group, exchange, listener, hello, spec, usable, arena_bytes, num_sms
            )
    except EPTimeout:
        exchange.abandon()
        raise
    except BaseException as error:  # also of the store, the system, our own mistakes, or ^C
        exchange.fail(error)
        raise
    exchange.finish()
    return Constructed(spec, opened, reason)


@contextlib.contextmanager
def _keeping_nothing() -> Iterator[None]:
    """An error's traceback keeps the locals of calls that made memory in vain: let go of them."""
    try:
        yield
    except BaseException as error:
        left: list[BaseException | None] = [error]
        seen: set[int] = set()
        while left:
            one = left.pop()
            if one is None or id(one) in seen:
                continue
            seen.add(id(one))
            left += [one.__cause__, one.__context__]
            for frame, _ in traceback.walk_tb(one.__traceback__):
                if str(frame.f_globals.get("__name__")).partition(".")[0] == "ep_comm":
                    with contextlib.suppress(RuntimeError):  # it still runs
                        frame.clear()
        raise


def _open_backend(
    group: Group,
    exchange: Exchange,
    listener: Listener,
    hello: Hello,
    spec: BufferSpec,
    config: EPConfig,
    arena_bytes: int | None,
    num_sms: int | None,
) -> tuple[Backend, str]:
    """The backend all ranks agree on, ready to use, and why it is this one."""
    me = group.rank
    answers = exchange.gather("hello", hello.pack())
    hellos = [Hello.unpack(data, rank) for rank, data in enumerate(answers)]
    check_agreement(me, hellos)
    per_node = hello.ranks_per_node or None
    name, reason = choose(hello.backend, spec.device.type, group, hellos, per_node)
    if config.paranoid and name != "cpu":
        what = f"cannot use backend {name!r}: it has no paranoid mode"
        fix = "pass backend='cpu', or EPConfig(paranoid=False)"
        raise make_error("E404", what, rank=me, fix=fix)
    if config.masking and name == "collective":
        what, fix = f"cannot use backend {name!r}: it has no masks", "pass EPConfig(masking=False)"
        raise make_error("E404", what, rank=me, fix=fix)
    generation = int.from_bytes(group_token(hellos)[:8], "little") >> 1
    shape = _shape(spec)
    if name in ("nvlink", "hybrid"):
        from ep_comm.backends import hybrid, nvlink

        same = (group, hellos, listener, exchange, shape, spec, generation)
        options = (config, arena_bytes, num_sms)
        try:
            with _keeping_nothing():
                if name == "nvlink":
                    return nvlink.open_backend(*same, *options), reason
                nodes = find_nodes(per_node, hellos)
                assert not isinstance(nodes, str)
                return hybrid.open_backend(*same, *options, nodes), reason
        except EPError as error:  # on all ranks alike
            if config.masking:  # what would come instead has none
                raise
            name, reason = instead_of_gpu(hello.backend, group, error)
    if name == "collective":
        from ep_comm.backends.collective import CollectiveBackend

        return CollectiveBackend(spec, generation, config, group, hellos, exchange), reason
    from ep_comm.backends import cpu

    with _keeping_nothing():
        host = cpu.open_backend(
            group, hellos, listener, exchange, shape, spec, generation,
            config, arena_bytes,
        )  # fmt: skip
    return host, reason


def _device(asked: torch.device | str | None) -> torch.device:
    if asked is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if asked is None:
        return torch.device("cpu")
    try:
        device = torch.device(asked)
    except Exception as error:  # RuntimeError, TypeError, for bytes UnicodeDecodeError
        what = f"rejected device={shown(asked)}: want a device, {error}"
        raise make_error("E203", what) from None
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        built = bool(torch.version.cuda)
        reason = "torch finds no GPU" if built else f"torch {torch.__version__} has no CUDA"
        raise make_error("E401", f"has no GPU: {reason}, device={shown(asked)}")
    # Tensors always have an index.
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


def _hello(
    spec: BufferSpec,
    backend: str,
    ranks_per_node: int | None,
    members: tuple[int, ...],
    host: tuple[bytes, int],
    token: bytes,
    *,
    paranoid: bool,
    masking: bool,
    direct: bool,
) -> Hello:
    boot_id, namespace = host
    return Hello(
        protocol=_core.PROTOCOL_VERSION,
        version=_core.BUILD["version"],
        structs=_hash(struct.pack(f"<{len(_core.STRUCT_SIZES)}q", *_core.STRUCT_SIZES)),
        world_size=spec.num_ranks,
        members=_hash(struct.pack(f"<{len(members)}q", *members)),
        num_experts=spec.num_experts,
        expert_map=_hash(struct.pack(f"<{len(spec.owner)}i", *spec.owner)),
        hidden=spec.hidden,
        num_topk=spec.num_topk,
        max_tokens=spec.max_tokens,
        num_slots=spec.num_slots,
        paranoid=int(paranoid),
        masking=int(masking),
        direct=int(direct),
        backend=backend,
        ranks_per_node=ranks_per_node or 0,
        device=spec.device.type,
        rank=spec.rank,
        pid=os.getpid(),
        boot_id=boot_id,
        pid_namespace=namespace,
        gpu=_gpu(spec.device),
        token=token,
    )


def _gpu(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return _hash(str(torch.cuda.get_device_properties(device).uuid).encode())


def _shape(spec: BufferSpec) -> _core.Shape:
    shape = _core.Shape()
    shape.num_ranks = spec.num_ranks
    shape.num_slots = spec.num_slots
    shape.num_experts = spec.num_experts
    shape.max_local_experts = max(spec.owner.count(r) for r in range(spec.num_ranks))
    shape.num_topk = spec.num_topk
    shape.max_tokens = spec.max_tokens
    return shape
