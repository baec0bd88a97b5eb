"""The native core; csrc/bind binds it, tests/test_pyi.py compares. Addresses are integers."""

from collections.abc import Callable, Sequence
from typing import ClassVar

BUILD: dict[str, str]
MAX_TOPK: int
MAX_RANKS: int
MAX_SLOTS: int
ROW_ALIGN: int
EXTENT_ALIGN: int
REASON_BYTES: int
PROTOCOL_VERSION: int
STRUCT_SIZES: tuple[int, ...]
DESCRIPTOR_FIELDS: tuple[str, ...]

class OpKind:
    NONE: ClassVar[OpKind]
    DISPATCH: ClassVar[OpKind]
    COMBINE: ClassVar[OpKind]
    def __init__(self, value: int) -> None: ...
    def __int__(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class RecvLayout:
    COMPACT: ClassVar[RecvLayout]
    GROUPED: ClassVar[RecvLayout]
    SLAB: ClassVar[RecvLayout]
    def __init__(self, value: int) -> None: ...
    def __int__(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class DType:
    BF16: ClassVar[DType]
    F16: ClassVar[DType]
    F32: ClassVar[DType]
    E4M3: ClassVar[DType]
    E5M2: ClassVar[DType]
    I8: ClassVar[DType]
    U8: ClassVar[DType]
    def __init__(self, value: int) -> None: ...
    def __int__(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class Quantize:
    NONE: ClassVar[Quantize]
    FP8: ClassVar[Quantize]
    FP8_UE8M0: ClassVar[Quantize]
    def __init__(self, value: int) -> None: ...
    def __int__(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class Site:
    NONE: ClassVar[Site]
    SLOT: ClassVar[Site]
    ENTRY: ClassVar[Site]
    BASE: ClassVar[Site]
    ROWS: ClassVar[Site]
    PULLED: ClassVar[Site]
    def __init__(self, value: int) -> None: ...
    def __int__(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class Shape:
    def __init__(self) -> None: ...
    num_ranks: int
    num_slots: int
    num_experts: int
    max_local_experts: int
    num_topk: int
    max_tokens: int

class ControlLayout:
    def __init__(self, shape: Shape) -> None: ...
    @property
    def end(self) -> int: ...
    def regions(self) -> list[tuple[str, int, int]]: ...  # name, offset, bytes

class MetaLayout:
    def __init__(
        self,
        num_topk: int,
        with_routing: bool,
        with_weights: bool,
        with_rows: bool,
        scale_bytes: int,
    ) -> None: ...
    @property
    def bytes(self) -> int: ...

class Outcome:
    def __init__(self, code: int, reason: str = ..., detail: Sequence[int] = ...) -> None: ...
    @property
    def code(self) -> int: ...
    @property
    def site(self) -> Site: ...
    @property
    def op(self) -> OpKind: ...
    @property
    def rank(self) -> int: ...
    @property
    def peer(self) -> int: ...
    @property
    def seq(self) -> int: ...
    @property
    def peer_seq(self) -> int: ...
    @property
    def waited_s(self) -> float: ...
    @property
    def want(self) -> int: ...
    @property
    def have(self) -> int: ...
    @property
    def detail(self) -> tuple[int, int, int, int]: ...
    @property
    def reason(self) -> str: ...

class DispatchArgs:
    def __init__(self) -> None: ...
    x: int
    scales: int
    topk_idx: int
    topk_weights: int
    send_row: int
    rank_counts: int
    expert_counts: int
    rank_rows: int
    num_tokens: int
    x_stride: int
    hidden: int
    scale_bytes: int
    capacity: int
    given_capacity: int
    index_capacity: int
    num_topk: int
    alignment: int
    scale_block: int
    layout: RecvLayout
    dtype: DType
    quantize: Quantize
    with_weights: bool
    is_static: bool
    cached: bool
    routing: int
    def row_bytes(self) -> int: ...

class UnpackArgs:
    def __init__(self) -> None: ...
    recv_src: int
    recv_row: int
    topk_idx: int
    topk_weights: int
    scales: int
    offsets: int
    row_index: int
    row_token: int
    source_range: int
    max_recv: int
    max_rows: int
    max_index: int
    row_alignment: int
    idx_is_int64: bool

class CombineArgs:
    def __init__(self) -> None: ...
    x: int
    y_weights: int
    topk_idx: int
    topk_weights: int
    send_row: int
    rank_counts: int
    recv_src: int
    recv_row: int
    bias0: int
    bias1: int
    out: int
    out_weights: int
    num_tokens: int
    num_recv: int
    num_rows: int
    hidden: int
    arena_offset: int
    num_topk: int
    layout: RecvLayout
    dtype: DType
    weighted: bool
    with_weights: bool
    sum_weights: bool
    topk_order: bool
    routing: int

class SystemCallError(OSError): ...

class Segment:
    @staticmethod
    def create(label: str, bytes: int) -> Segment: ...
    @staticmethod
    def map(fd: int, bytes: int) -> Segment: ...
    @property
    def fd(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def address(self) -> int: ...
    def committed_bytes(self) -> int: ...
    def close_fd(self) -> None: ...

class Arena:
    def __init__(self, segment: Segment) -> None: ...
    def array(self, bytes: int) -> object: ...
    def offset_of(self, address: int, bytes: int) -> int: ...
    def discard_free(self) -> None: ...
    def stats(self) -> dict[str, int]: ...

class Dispatched:
    @property
    def outcome(self) -> Outcome: ...
    @property
    def seq(self) -> int: ...
    @property
    def num_recv(self) -> int: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def group_start(self) -> list[int]: ...
    def drop(self) -> None: ...

class Pending:
    def done(self) -> bool: ...
    def wait(self) -> bool: ...
    @property
    def dispatched(self) -> Dispatched: ...
    @property
    def combined(self) -> Outcome: ...

class CpuCommunicator:
    def __init__(
        self,
        shape: Shape,
        rank: int,
        generation: int,
        expert_owner: Sequence[int],
        peers: Sequence[tuple[Segment, Segment, int, int, int]],
        arena: Arena,
        clocks: tuple[float, float, float],
    ) -> None: ...
    def dispatch(
        self, args: DispatchArgs, late: Callable[[int, int, float], object] | None = ...
    ) -> Dispatched: ...
    def combine(
        self, args: CombineArgs, late: Callable[[int, int, float], object] | None = ...
    ) -> Outcome: ...
    def refuse(self, kind: OpKind, why: Outcome) -> None: ...
    def begin_dispatch(self, args: DispatchArgs) -> Pending: ...
    def begin_combine(self, args: CombineArgs) -> Pending: ...
    def unpack(self, dispatched: Dispatched, args: DispatchArgs, out: UnpackArgs) -> bool: ...
    def x_array(self, dispatched: Dispatched, bytes: int) -> object: ...
    def close(self) -> None: ...
    def verdict(self) -> Outcome: ...
    def seq(self) -> int: ...
    def seed_seq(self, seq: int) -> None: ...

def simd() -> str: ...
def force_simd(name: str | None) -> bool: ...
