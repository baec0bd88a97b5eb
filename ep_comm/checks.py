"""Argument checks: pure functions that precede every side effect and say argument, got and want."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from ep_comm import _core
from ep_comm.errors import EPError, make_error, shown
from ep_comm.handle import LAYOUTS, Handle, HandleMeta, parse_handle
from ep_comm.replicas import LayerReplicas

Layout = Literal["compact", "grouped", "slab"]
Quantize = Literal["fp8", "fp8_ue8m0"]
Output = Literal["auto", "arena", "torch"]
Transfer = Literal["sm", "copy_engine"]
Order = Literal["rank", "topk"]

MAX_TOPK: Final = _core.MAX_TOPK
MAX_RANKS: Final = _core.MAX_RANKS
MIN_SLOTS: Final = 2
MAX_SLOTS: Final = _core.MAX_SLOTS
MAX_HIDDEN: Final = 1 << 20
MAX_EXPERTS: Final = 1 << 20
ROW_ALIGN: Final = _core.ROW_ALIGN  # bytes
MAX_COUNT: Final = (1 << 31) - 1  # rows, experts and tokens travel as int32
MAX_BYTES: Final = 1 << 62
QUANTIZABLE: Final = (torch.bfloat16, torch.float16, torch.float32)
ONE_BYTE: Final = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8)
DISPATCHABLE: Final = (*QUANTIZABLE, *ONE_BYTE)
IDS: Final = (torch.int64, torch.int32)
WEIGHTS: Final = (torch.float32, torch.bfloat16, torch.float16)
SCALE_BLOCKS: Final = (128, 32)
QUANTIZE: Final = get_args(Quantize)
OUTPUTS: Final = get_args(Output)
TRANSFERS: Final = get_args(Transfer)
ORDERS: Final = get_args(Order)


@dataclass(frozen=True)
class BufferSpec:
    """What a buffer was built for; equal on all ranks but for `rank` and the device's index."""

    rank: int
    num_ranks: int
    num_experts: int
    num_topk: int
    hidden: int
    max_tokens: int
    num_slots: int
    owner: tuple[int, ...]  # rank of each expert
    device: torch.device

    @cached_property
    def num_local_experts(self) -> int:
        return self.owner.count(self.rank)


@dataclass
class DispatchCall:
    """A checked dispatch, ready for a backend: tensors on the buffer's device.

    T tokens here, K top-k, H hidden, S scale words per token.
    """

    x: Tensor  # [T, H], rows dense, row stride a multiple of 16 bytes
    topk_idx: Tensor  # int64 [T, K], contiguous, as all below
    idx_dtype: torch.dtype  # of the ids returned
    topk_weights: Tensor | None  # float32 [T, K]
    scales: Tensor | None  # [T, S] given by the caller
    scale_words: int  # S as it travels, given or made by quantize; 0 = none
    scale_dtype: torch.dtype | None  # float32, or int32 of four exponents; None = no scales
    handle: Handle | None  # of a cached dispatch
    meta: HandleMeta | None  # of `handle`
    layout: Layout
    alignment: int
    given_capacity: int | None  # as the caller passed it, the same on all ranks
    capacity: int | None  # rows of x (slab: per expert) when they do not follow from what arrives;
    #   None = they do; may differ between ranks
    sync: bool
    quantize: Quantize | None
    scale_block: int
    row_index: bool
    origins: bool
    output: Output
    num_sms: int | None
    tag: str
    replicas: LayerReplicas | None = None  # then topk_idx names logical experts
    transfer: Transfer = "sm"
    recv_stats: Tensor | None = None  # int32 [local experts], written to, as the next one
    wait_stats: Tensor | None = None  # int64 [ranks]

    @property
    def num_topk(self) -> int:
        return self.topk_idx.shape[1]

    @property
    def has_weights(self) -> bool:
        return self.topk_weights is not None

    @property
    def wire_dtype(self) -> torch.dtype:
        """Of the rows as they travel and arrive."""
        return self.x.dtype if self.quantize is None else torch.float8_e4m3fn


@dataclass
class CombineCall:
    """A checked combine, ready for a backend."""

    x: Tensor  # expert output in the rows of the dispatch, `meta.x_shape`, contiguous
    handle: Handle
    meta: HandleMeta  # of `handle`
    weighted: bool
    topk_weights: Tensor | None  # float32, to send back; shape: see Buffer.combine
    order: Order
    sum_weights: bool
    per_rank: bool
    row_weights: Tensor | None  # float32 [rows] in the shape of x, of each row at its owner
    bias: tuple[Tensor | None, Tensor | None]  # each [T, H]
    out: Tensor | None  # [T, H]
    wait_stats: Tensor | None  # int64 [ranks], written to
    num_sms: int | None
    tag: str


def check_transfer(transfer: Any, call: DispatchCall, backend: str) -> Transfer:
    """E203 unless this call can be moved so."""
    one_of("transfer", transfer, TRANSFERS)
    if transfer == "sm":
        return "sm"
    wants = {
        "backend 'nvlink'": backend == "nvlink",
        "sync=True": call.sync,
        "layout='compact'": call.layout == "compact",
        "quantize=None": call.quantize is None,
    }
    if missing := [want for want, given in wants.items() if not given]:
        raise make_error("E203", f"rejected transfer={transfer!r}: want {missing[0]} with it")
    return "copy_engine"


def check_fills(call: DispatchCall | CombineCall, backend: str, fills: frozenset[str]) -> None:
    """E203 unless the backend fills the statistics asked for."""
    for name in ("recv_stats", "wait_stats"):
        if getattr(call, name, None) is not None and name not in fills:
            raise make_error("E203", f"rejected {name}: want None with backend {backend!r}")


def as_tensor(name: str, value: Any) -> Tensor:
    """The one door for arrays: what has DLPack or a CUDA array interface becomes a tensor."""
    if isinstance(value, Tensor):
        return value
    what = f"rejected {name}: got {type(value).__name__}, want a tensor or DLPack array"
    try:
        if hasattr(value, "__dlpack__"):
            strides = getattr(value, "strides", None)
            if isinstance(strides, tuple) and min(strides, default=0) < 0:
                # torch 2.13 ends the process for x[::-1] of numpy instead of raising
                raise rejected("E202", name, f"strides {list(strides)}", "none negative")
            tensor: Tensor = torch.from_dlpack(value)
            return tensor
        if hasattr(value, "__cuda_array_interface__"):
            return torch.as_tensor(value)
    except EPError:
        raise
    except Exception as error:  # each library raises its own, e.g. numpy for a read-only array
        raise make_error("E200", f"{what} ({error})") from error
    raise make_error("E200", what)


def rejected(code: str, name: str, got: Any, want: Any) -> EPError:
    """`rejected {name}: got {got}, want {want}`"""
    return make_error(code, f"rejected {name}: got {got}, want {want}")


def dtype_name(dtype: torch.dtype | torch.layout) -> str:
    return str(dtype).removeprefix("torch.")


def names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(dtype_name(d) for d in dtypes)


def check_tensor(
    name: str,
    value: Any,
    spec: BufferSpec,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int | str],
) -> Tensor:
    """E200, E201 or E202 unless `value` has one of the dtypes, the shape and the buffer's device.

    A str in `shape` is the name of a size that may be anything.
    """
    tensor = as_tensor(name, value)
    if tensor.dtype not in dtypes:
        raise rejected("E200", name, dtype_name(tensor.dtype), names(dtypes))
    if tensor.layout != torch.strided:
        raise rejected("E202", name, dtype_name(tensor.layout), "strided")
    if tensor.is_nested or tensor.is_neg():  # its bytes are not its values
        raise rejected("E202", name, "a nested or negated view", "a plain tensor")
    fits = tensor.dim() == len(shape) and all(
        isinstance(w, str) or g == w for g, w in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        want = "[" + ", ".join(str(w) for w in shape) + "]"
        raise rejected("E201", name, list(tensor.shape), want)
    if tensor.device != spec.device:
        raise rejected("E202", name, f"device {tensor.device}", spec.device)
    return tensor


def real(name: str, tensor: Tensor) -> Tensor:
    """E202 unless there is memory behind the tensor, which a fake one lacks."""
    if tensor.data_ptr() == 0 and tensor.numel() > 0:
        want = "a real one; to trace a call, make it through ep_comm.autograd"
        raise rejected("E202", name, "a fake tensor", want)
    return tensor


def dense(name: str, tensor: Tensor) -> Tensor:
    """E202 unless the tensor is real, contiguous and 16 bytes aligned."""
    real(name, tensor)
    if not tensor.is_contiguous():
        raise rejected("E202", name, f"strides {list(tensor.stride())}", "contiguous")
    if tensor.numel() > 0 and tensor.data_ptr() % ROW_ALIGN != 0:
        raise rejected(
            "E202", name, f"address % {ROW_ALIGN} = {tensor.data_ptr() % ROW_ALIGN}", "0"
        )
    return tensor


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two dense tensors share a byte."""
    a_start, b_start = a.data_ptr(), b.data_ptr()
    a_end, b_end = a_start + a.numel() * a.itemsize, b_start + b.numel() * b.itemsize
    return max(a_start, b_start) < min(a_end, b_end)


def positive(
    name: str, value: Any, minimum: int = 1, code: str = "E203", maximum: int = MAX_COUNT
) -> int:
    """An int from minimum to maximum; `code` unless it is one."""
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        what = f"rejected {name}={shown(value)}: want an int from {minimum} to {maximum}"
        raise make_error(code, what)
    return value


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> Any:
    """E203 unless `value` is one of `allowed`, of the same type, too: 128.0 is no 128."""
    if type(value) not in {type(a) for a in allowed} or value not in allowed:
        want = ", ".join(map(repr, allowed))
        raise make_error("E203", f"rejected {name}={shown(value)}: want one of {want}")
    return value


def flag(name: str, value: Any) -> bool:
    """The truth of `value`; E203 when it has none, as an array."""
    try:
        return bool(value)
    except Exception:
        what = f"rejected {name}={shown(value)}: want True or False"
        raise make_error("E203", what) from None


def check_memory(shape: Any, dtype: Any) -> tuple[int, ...]:
    """The sizes of a new tensor; E200, E201 or E231 unless there can be such a tensor."""
    if not isinstance(dtype, torch.dtype):
        raise rejected("E200", "dtype", shown(dtype), "a torch.dtype")
    try:
        torch.empty(0, dtype=torch.uint8).view(dtype)
    except RuntimeError:
        raise rejected("E200", "dtype", dtype_name(dtype), "one of whole bytes") from None
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except Exception:  # each kind of array raises its own
        raise rejected("E201", "shape", shown(shape), "ints") from None
    if min(sizes, default=0) < 0:
        raise rejected("E201", "shape", list(sizes), "no negative size")
    num_bytes = dtype.itemsize * math.prod(max(size, 1) for size in sizes)
    if num_bytes > MAX_BYTES:
        raise make_error("E231", f"is out of arena memory: need {num_bytes} B")
    return sizes


def expert_owner(num_experts: int, num_ranks: int, expert_map: Any) -> tuple[int, ...]:
    """Rank of each expert: contiguous blocks as even as possible, or the caller's map (E212)."""
    if expert_map is None:
        base, extra = divmod(num_experts, num_ranks)
        sizes = [base + (r < extra) for r in range(num_ranks)]
        return tuple(r for r, size in enumerate(sizes) for _ in range(size))
    try:
        listed = expert_map.tolist() if hasattr(expert_map, "tolist") else list(expert_map)
        owner = tuple(operator.index(r) for r in listed)  # an int of any kind, but no 0.5
    except Exception as error:  # each kind of array raises its own
        raise make_error("E212", f"rejected map: {error}, want int [{num_experts}]") from None
    if len(owner) != num_experts:
        raise make_error("E212", f"rejected map: {len(owner)} entries, want {num_experts}")
    for expert, rank in enumerate(owner):
        if not 0 <= rank < num_ranks:
            raise make_error("E212", f"rejected map: expert {expert} on rank {rank} of {num_ranks}")
    return owner


def hidden_multiple(dtype: torch.dtype) -> int:
    """Elements of which `hidden` must be a multiple, so that rows are multiples of 16 bytes."""
    return ROW_ALIGN // dtype.itemsize


def check_hidden(hidden: int, dtype: torch.dtype) -> None:
    """E211 unless rows of `hidden` elements are a multiple of 16 bytes."""
    multiple = hidden_multiple(dtype)
    if hidden % multiple != 0:
        what = f"rejected hidden={hidden}: want a multiple of {multiple} for {dtype_name(dtype)}"
        raise make_error("E211", what)


# ---- construction ----


def check_options(
    rank: int,
    num_ranks: int,
    *,
    num_experts: Any,
    num_topk: Any,
    hidden: Any,
    max_tokens: Any,
    num_slots: Any,
    expert_map: Any,
    device: torch.device,
    arena_bytes: Any,
    num_sms: Any,
) -> BufferSpec:
    """Everything about a buffer's options that one rank can see; E203, E210, E211 or E212."""
    positive("num_experts", num_experts, maximum=MAX_EXPERTS)
    positive("max_tokens", max_tokens)
    positive("hidden", hidden)
    if hidden > MAX_HIDDEN:
        raise make_error("E211", f"rejected hidden={hidden}: want <= {MAX_HIDDEN}")
    widest = max(DISPATCHABLE, key=lambda dtype: dtype.itemsize)
    if hidden % hidden_multiple(widest) != 0:  # then no dtype has such rows
        what = f"rejected hidden={hidden}: want rows of a multiple of {ROW_ALIGN} bytes"
        raise make_error("E211", what)
    if positive("num_topk", num_topk, code="E210") > MAX_TOPK:
        raise make_error("E210", f"rejected top_k={num_topk}: limit {MAX_TOPK}")
    positive("num_slots", num_slots, MIN_SLOTS, maximum=MAX_SLOTS)
    if num_ranks > MAX_RANKS:
        raise make_error("E212", f"rejected {num_ranks} ranks: limit {MAX_RANKS}")
    if arena_bytes is not None:
        positive("arena_bytes", arena_bytes, maximum=MAX_BYTES)
    if num_sms is not None:
        positive("num_sms", num_sms)
    owner = expert_owner(num_experts, num_ranks, expert_map)
    return BufferSpec(
        rank, num_ranks, num_experts, num_topk, hidden, max_tokens, num_slots, owner, device
    )


# ---- dispatch ----


def check_dispatch(
    spec: BufferSpec,
    generation: int,
    x: Any,
    topk_idx: Any,
    topk_weights: Any,
    *,
    scales: Any,
    scale_block: Any,
    quantize: Any,
    handle: Any,
    layout: Any,
    alignment: Any,
    row_index: Any,
    origins: Any,
    capacity: Any,
    sync: Any,
    output: Any,
    recv_stats: Any,
    wait_stats: Any,
    num_sms: Any,
    tag: Any,
) -> DispatchCall:
    """Everything about a dispatch that one rank can see; changes nothing.

    Raises:
        EPError: E200 to E203, E210, E211, E230 or E320; without rank and operation, which the
            caller adds. Ids are checked by the backend, which reads them anyway.
    """
    x = real("x", check_tensor("x", x, spec, DISPATCHABLE, ("num_tokens", spec.hidden)))
    check_hidden(spec.hidden, x.dtype)
    num_tokens = x.shape[0]
    if num_tokens > spec.max_tokens:
        what = f"has too many tokens: got {num_tokens}, want <= {spec.max_tokens}"
        raise make_error(
            "E230", what, fix=f"build the Buffer with max_tokens={num_tokens}, or send fewer"
        )
    if x.numel() > 0 and (
        x.stride(1) != 1 or x.stride(0) * x.itemsize % ROW_ALIGN or x.data_ptr() % ROW_ALIGN
    ):
        raise rejected("E202", "x", f"strides {list(x.stride())}", "dense rows, 16 bytes aligned")
    one_of("layout", layout, LAYOUTS)
    one_of("output", output, OUTPUTS)
    positive("alignment", alignment)
    if alignment * spec.num_local_experts > MAX_COUNT // 2:
        most = MAX_COUNT // 2 // spec.num_local_experts  # padding must not overflow row numbers
        raise make_error("E203", f"rejected alignment={alignment}: want <= {most} here")
    if alignment != 1 and layout == "slab":
        raise make_error("E203", f"rejected alignment={alignment}: want 1 with layout='slab'")
    if num_sms is not None:
        positive("num_sms", num_sms)
    if capacity is not None:
        positive("capacity", capacity, 0)
    sync, row_index = flag("sync", sync), flag("row_index", row_index)
    origins = flag("origins", origins)
    if origins and handle is not None:
        raise make_error("E203", "rejected origins=True: want False with handle=")
    if recv_stats is not None and handle is not None:  # its selections have been counted
        raise make_error("E203", "rejected recv_stats: want None with handle=")
    if row_index and layout != "compact":
        raise make_error("E203", f"rejected row_index=True: want layout='compact', got {layout!r}")
    scale_tensor, words, scale_dtype = check_scales(spec, x, scales, scale_block, quantize)
    parsed: Handle | None = None
    meta: HandleMeta | None = None
    if handle is not None:  # which decides all of this; row_index cannot be made of it
        parsed, meta = _routing_of_handle(spec, generation, handle, topk_idx, num_tokens)
        idx, idx_dtype = parsed.topk_idx, torch.int64
        layout, alignment, sync, row_index = meta.layout, meta.alignment, meta.sync, False
        capacity = None if meta.capacity < 0 else meta.capacity
    else:
        idx, idx_dtype = _check_ids(spec, topk_idx, num_tokens)
    weights = _check_weights(spec, topk_weights, num_tokens, idx.shape[1])
    call = DispatchCall(
        x=x,
        topk_idx=idx,
        idx_dtype=idx_dtype,
        topk_weights=weights,
        scales=scale_tensor,
        scale_words=words,
        scale_dtype=scale_dtype,
        handle=parsed,
        meta=meta,
        layout=layout,
        alignment=alignment,
        given_capacity=capacity,
        capacity=capacity,
        sync=sync,
        quantize=quantize,
        scale_block=0 if scale_block is None else scale_block,
        row_index=row_index,
        origins=origins,
        output=output,
        num_sms=num_sms,
        tag=str(tag),
        recv_stats=check_stats("recv_stats", recv_stats, spec, torch.int32, spec.num_local_experts),
        wait_stats=check_stats("wait_stats", wait_stats, spec, torch.int64, spec.num_ranks),
    )
    call.capacity = default_capacity(spec, call)
    slabs = spec.num_local_experts if call.layout == "slab" else 1
    if call.capacity is not None and call.capacity * slabs > MAX_COUNT:
        what = f"rejected capacity={call.capacity}: {slabs} times it, want <= {MAX_COUNT} rows"
        raise make_error("E203", what)
    return call


def default_capacity(spec: BufferSpec, call: DispatchCall) -> int | None:
    """Rows of x where the shape cannot follow from what arrives; None = it does."""
    if call.given_capacity is not None or (call.sync and call.layout != "slab"):
        return call.given_capacity
    if call.layout == "grouped":
        return worst_grouped_rows(spec, call)
    return spec.num_ranks * spec.max_tokens


def worst_grouped_rows(spec: BufferSpec, call: DispatchCall) -> int:
    """Rows of all groups, padding included, when nobody chooses an expert twice."""
    local = spec.num_local_experts
    if local == 0:
        return 0
    worst = spec.num_ranks * spec.max_tokens
    if call.layout == "compact" and call.given_capacity is not None:
        worst = min(worst, call.given_capacity)
    rows = worst * min(call.num_topk, local) + local * (call.alignment - 1)
    return -(-rows // call.alignment) * call.alignment


def _check_ids(spec: BufferSpec, topk_idx: Any, num_tokens: int) -> tuple[Tensor, torch.dtype]:
    if topk_idx is None:
        raise make_error(
            "E201", "rejected topk_idx: got None, want ids, or a handle of an earlier dispatch"
        )
    idx = check_tensor("topk_idx", topk_idx, spec, IDS, (num_tokens, "num_topk"))
    limit = min(spec.num_topk, MAX_TOPK)
    if not 1 <= idx.shape[1] <= limit:
        raise make_error("E210", f"rejected top_k={idx.shape[1]}: limit {limit}, at least 1")
    return idx.to(torch.int64).contiguous(), idx.dtype


def check_stats(
    name: str, stats: Any, spec: BufferSpec, dtype: torch.dtype, size: int
) -> Tensor | None:
    """A tensor that is added to in place."""
    if stats is None:
        return None
    tensor = real(name, check_tensor(name, stats, spec, (dtype,), (size,)))
    if not tensor.is_contiguous():
        raise rejected("E202", name, f"strides {list(tensor.stride())}", "contiguous")
    return tensor


def _check_weights(spec: BufferSpec, weights: Any, num_tokens: int, num_topk: int) -> Tensor | None:
    if weights is None:
        return None
    tensor = check_tensor("topk_weights", weights, spec, WEIGHTS, (num_tokens, num_topk))
    return tensor.to(torch.float32).contiguous()


def check_scales(
    spec: BufferSpec, x: Tensor, scales: Any, block: Any, quantize: Any
) -> tuple[Tensor | None, int, torch.dtype | None]:
    """The scales given, the words per token that travel, and their dtype."""
    if block is not None or scales is None:
        one_of("scale_block", block, SCALE_BLOCKS)
    one_of("quantize", quantize, (None, *QUANTIZE))
    if scales is not None and quantize is not None:
        raise make_error("E203", f"rejected quantize={quantize!r}: want None with given scales")
    if quantize is not None:
        if x.dtype not in QUANTIZABLE:
            raise rejected("E200", "x", dtype_name(x.dtype), f"{names(QUANTIZABLE)} with quantize=")
        per_word = block * (4 if quantize == "fp8_ue8m0" else 1)
        if spec.hidden % per_word:
            want = f"want a multiple of {per_word} with quantize={quantize!r}"
            raise make_error("E211", f"rejected hidden={spec.hidden}: {want}")
        dtype = torch.int32 if quantize == "fp8_ue8m0" else torch.float32
        return None, spec.hidden // per_word, dtype
    if scales is None:
        return None, 0, None
    if x.dtype not in ONE_BYTE:
        raise rejected("E200", "x", dtype_name(x.dtype), f"{names(ONE_BYTE)} with scales=")
    tensor = check_tensor(
        "scales", scales, spec, (torch.float32, torch.int32), (x.shape[0], "words")
    )
    num_words = tensor.shape[1]
    if block is not None:
        per_word = block * (4 if tensor.dtype == torch.int32 else 1)
        num_words = -(-spec.hidden // per_word)
    if tensor.shape[1] != num_words:
        raise rejected("E201", "scales", list(tensor.shape), [x.shape[0], num_words])
    return tensor.contiguous(), num_words, tensor.dtype


def _routing_of_handle(
    spec: BufferSpec, generation: int, handle: Any, topk_idx: Any, num_tokens: int
) -> tuple[Handle, HandleMeta]:
    if topk_idx is not None:
        raise make_error("E203", "rejected topk_idx: want None with handle=")
    parsed, meta = check_handle(spec, generation, handle)
    if meta.num_tokens != num_tokens:
        raise make_error("E320", f"rejected handle: of {meta.num_tokens} tokens, want {num_tokens}")
    return parsed, meta


def check_handle(spec: BufferSpec, generation: int, handle: Any) -> tuple[Handle, HandleMeta]:
    """E320 unless the handle is whole, of this buffer, and dense on its device."""
    parsed, meta = parse_handle(handle, generation=generation)
    world = (meta.num_ranks, meta.num_experts, meta.num_local_experts, meta.hidden)
    mine = (spec.num_ranks, spec.num_experts, spec.num_local_experts, spec.hidden)
    sizes_fit = meta.num_topk <= MAX_TOPK and max(meta.alignment, meta.capacity) <= MAX_COUNT
    if world != mine or meta.num_topk < 1 or not sizes_fit:
        raise make_error("E320", f"rejected handle: of {world}, want {mine}")
    for tensor in parsed[1:]:
        if tensor.device != spec.device or not tensor.is_contiguous():
            raise make_error("E320", f"rejected handle: tensors not contiguous on {spec.device}")
    if parsed.topk_weights.dtype != torch.float32:  # the reference has float64 ones
        raise make_error("E320", f"rejected handle: topk_weights {parsed.topk_weights.dtype}")
    if spec.device.type == "cpu":  # elsewhere the host would wait for the device
        _check_handle_counts(parsed, meta)
    return parsed, meta


def _check_handle_counts(handle: Handle, meta: HandleMeta) -> None:
    """E320 for counts that somebody changed: everything else in a handle is bounded by them."""
    sent, received = handle.rank_counts.tolist()
    selections = handle.num_tokens_per_expert.tolist()
    total = sum(received)
    if (
        min([*sent, *received, *selections, 0]) < 0
        or max(sent) > meta.num_tokens
        or total > meta.num_unique
        or (meta.sync and total != meta.num_unique)
        or sum(selections) > total * meta.num_topk
    ):
        raise make_error("E320", "rejected handle: damaged, its counts contradict each other")


# ---- combine ----


def check_per_rank(meta: HandleMeta, *, weighted: bool, order: str, topk_weights: Any) -> None:
    """E203 unless owners can add up their rows of a token."""
    what = None
    if meta.layout == "compact":
        what = "want a grouped or slab handle, compact rows are one for each rank"
    elif weighted:
        what = "want row_weights= with it, owners multiply"
    elif order != "rank":
        what = f"want order='rank' with it, got {order!r}"
    elif topk_weights is not None:
        what = "want topk_weights=None with it"
    if what is not None:
        raise make_error("E203", f"rejected per_rank=True: {what}")


def check_combine(
    spec: BufferSpec,
    generation: int,
    x: Any,
    handle: Any,
    *,
    weighted: Any,
    topk_weights: Any,
    order: Any,
    sum_weights: Any,
    per_rank: Any,
    row_weights: Any,
    bias: Any,
    out: Any,
    wait_stats: Any,
    num_sms: Any,
    tag: Any,
) -> CombineCall:
    """Everything about a combine that one rank can see; changes nothing.

    Raises:
        EPError: E200 to E203, E211 or E320; without rank and operation, which the caller adds.
    """
    parsed, meta = check_handle(spec, generation, handle)
    x = dense("x", check_tensor("x", x, spec, QUANTIZABLE, meta.x_shape))
    check_hidden(spec.hidden, x.dtype)
    if num_sms is not None:
        positive("num_sms", num_sms)
    weighted = flag("weighted", weighted)
    if weighted and meta.layout == "compact":
        want = "want a grouped or slab handle, compact rows hold several experts"
        raise make_error("E203", f"rejected weighted=True: {want}")
    if weighted and not meta.has_weights:
        want = "want a handle whose dispatch was given topk_weights"
        raise make_error("E203", f"rejected weighted=True: {want}")
    one_of("order", order, ORDERS)
    if order == "topk" and meta.layout == "compact":
        want = "want a grouped or slab handle, a compact row is added once for all its slots"
        raise make_error("E203", f"rejected order='topk': {want}")
    sum_weights = flag("sum_weights", sum_weights)
    if sum_weights and meta.layout != "compact":
        what = "rejected sum_weights=True: want a compact handle, other rows hold one slot"
        raise make_error("E203", what)
    per_rank = flag("per_rank", per_rank)
    if per_rank:
        check_per_rank(meta, weighted=weighted, order=order, topk_weights=topk_weights)
    if row_weights is not None:
        if not per_rank:
            raise make_error("E203", "rejected row_weights: want per_rank=True with them")
        row_weights = dense(
            "row_weights",
            check_tensor("row_weights", row_weights, spec, (torch.float32,), meta.x_shape[:-1]),
        )
    weights = topk_weights
    if weights is not None:
        shape: tuple[int, ...] = meta.x_shape[:-1]
        if meta.layout == "compact":
            shape = (meta.num_rows, meta.num_topk)
        weights = check_tensor("topk_weights", weights, spec, (torch.float32,), shape).contiguous()
    token_shape = (meta.num_tokens, spec.hidden)
    pair = bias if isinstance(bias, tuple | list) else (bias, None)
    if len(pair) != 2:
        raise rejected("E201", "bias", f"{len(pair)} tensors", "one or two")
    first, second = (
        None if b is None else dense("bias", check_tensor("bias", b, spec, (x.dtype,), token_shape))
        for b in pair
    )
    if out is not None:
        out = dense("out", check_tensor("out", out, spec, (x.dtype,), token_shape))
        if overlap(out, x):  # peers may still read x when we write
            raise rejected("E202", "out", "memory of x", "memory of its own")
        for b in (first, second):  # a token's bias is read when other tokens are written
            if b is not None and b.data_ptr() != out.data_ptr() and overlap(out, b):
                raise rejected("E202", "out", "part of bias", "memory of its own or all of bias")
    return CombineCall(
        x,
        parsed,
        meta,
        weighted,
        weights,
        order,
        sum_weights,
        per_rank,
        row_weights,
        (first, second),
        out,
        check_stats("wait_stats", wait_stats, spec, torch.int64, spec.num_ranks),
        num_sms,
        str(tag),
    )
