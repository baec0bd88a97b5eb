"""The native core; csrc/bind binds it, tests/test_pyi.py compares. Addresses are integers."""

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor

BUILD: dict[str, str]
MAX_TOPK: int
MAX_RANKS: int
MAX_SLOTS: int
ROW_ALIGN: int
EXTENT_ALIGN: int
REASON_BYTES: int
PROTOCOL_VERSION: int
BAD_SEAL: int
RAIL_STAGING_BYTES: int
MAX_CHANNELS: int
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
    LINE: ClassVar[Site]
    RAIL_NOTICE: ClassVar[Site]
    RAIL_CHUNK: ClassVar[Site]
    RAIL_CREDIT: ClassVar[Site]
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
    stage_bytes: int

def stage_bytes_for(shape: Shape, hidden: int) -> int: ...

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
        with_seal: bool = False,
    ) -> None: ...
    @property
    def bytes(self) -> int: ...

class RailShape:
    @property
    def num_nodes(self) -> int: ...
    @property
    def ranks_per_node(self) -> int: ...
    @property
    def num_channels(self) -> int: ...
    @property
    def ring_chunks(self) -> int: ...
    @property
    def chunk_bytes(self) -> int: ...
    notice_bytes: int
    @property
    def staging_bytes(self) -> int: ...

class RailLayout:
    def __init__(self, shape: RailShape) -> None: ...
    @property
    def end(self) -> int: ...
    def regions(self) -> list[tuple[str, int, int]]: ...  # name, offset, bytes

class RailNoticeLayout:
    def __init__(self, shape: Shape, num_nodes: int, num_channels: int) -> None: ...
    @property
    def bytes(self) -> int: ...

class RailHeadLayout:
    def __init__(
        self, num_topk: int, with_weights: bool, with_records: bool, scale_bytes: int
    ) -> None: ...
    @property
    def bytes(self) -> int: ...

def sum_head_bytes(num_topk: int, with_weights: bool) -> int: ...

class RailChunks:
    def __init__(self, chunk_bytes: int, head_bytes: int, row_bytes: int) -> None: ...
    @property
    def records(self) -> int: ...
    @property
    def pieces(self) -> int: ...
    def chunks(self, count: int) -> int: ...

def divide_staging(
    num_nodes: int,
    ranks_per_node: int,
    num_channels: int,
    record_bytes: int,
    chunk_tokens: int = ...,
    budget: int = ...,
) -> RailShape: ...

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

class Replicas:
    def __init__(self) -> None: ...
    first: int
    slot: int
    until: int
    num_logical: int

class DispatchArgs:
    def __init__(self) -> None: ...
    x: int
    scales: int
    topk_idx: int
    topk_weights: int
    send_row: int
    rank_counts: int
    expert_counts: int
    rank_ends: int
    x_offset: int
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
    paranoid: bool
    routing: int
    replicas: Replicas
    routed_idx: int
    logical_load: int
    recv_stats: int
    wait_stats: int
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
    per_rank: bool
    row_weights: int
    wait_stats: int
    routing: int
    rail_log: int
    num_logged: int
    log_has_weights: bool

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
    @property
    def in_use(self) -> int: ...
    def array(self, byte_shape: Sequence[int]) -> object | None: ...
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
    def x_array(self, dispatched: Dispatched, byte_shape: Sequence[int]) -> object: ...
    def close(self) -> None: ...
    def verdict(self) -> Outcome: ...
    def seq(self) -> int: ...
    def seed_seq(self, seq: int) -> None: ...

class Distinct:
    NEVER: ClassVar[Distinct]
    PREFER: ClassVar[Distinct]
    ALWAYS: ClassVar[Distinct]
    def __init__(self, value: int) -> None: ...
    def __int__(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class PlanArgs:
    load: int
    together: int
    current: int
    expert: int
    num_layers: int
    num_experts: int
    num_shared: int
    num_slots: int
    num_ranks: int
    num_nodes: int
    num_groups: int
    hierarchical: bool
    distinct: Distinct
    slack: float
    node_slack: float
    def __init__(self) -> None: ...

def plan(args: PlanArgs) -> None: ...
def simd() -> str: ...
def force_simd(name: str | None) -> bool: ...

# ---- only in a build with CUDA; streams and device addresses travel as integers ----

class DeviceCallError(RuntimeError): ...

class DeviceMemory:
    @staticmethod
    def create(device: int, bytes: int, ipc: bool = ...) -> DeviceMemory: ...
    @staticmethod
    def map(device: int, fd: int, bytes: int) -> DeviceMemory: ...
    @property
    def fd(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def address(self) -> int: ...
    @property
    def is_ipc(self) -> bool: ...
    def drop(self) -> None: ...
    def restore(self) -> None: ...
    def restore_from(self, fd: int) -> None: ...
    def close_fd(self) -> None: ...

class StreamHold:
    def use_on(self, stream: int) -> None: ...

DLPACK_INT: int
DLPACK_UINT: int
DLPACK_FLOAT: int
DLPACK_BFLOAT: int

class DeviceArena:
    def __init__(self, memory: DeviceMemory) -> None: ...
    def grant(self, bytes: int, stream: int) -> StreamHold | None: ...
    def tensor(self, hold: StreamHold, shape: Sequence[int], type: tuple[int, int]) -> Tensor: ...
    def reclaim(self, stream: int) -> int: ...
    def offset_of(self, address: int, bytes: int) -> int: ...
    def stats(self) -> dict[str, int]: ...

class DispatchWants:
    def __init__(self) -> None: ...
    status: int
    num_recv: int
    offsets: int
    source_range: int
    recv_row: int
    max_recv: int
    max_rows: int
    num_sms: int
    num_warps: int
    wide_ids: bool
    row_index: bool
    row_token: bool
    grants_all: bool
    reports: bool
    by_copies: bool
    begun: int
    in_halves: bool

class CombineWants:
    def __init__(self) -> None: ...
    begun: int
    num_sms: int
    num_stages: int
    in_halves: bool

class BegunCombine:
    @property
    def is_half(self) -> bool: ...

class Flight:
    @property
    def is_half(self) -> bool: ...
    @property
    def outcome(self) -> Outcome: ...
    @property
    def num_recv(self) -> int: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def index_rows(self) -> int: ...
    @property
    def number(self) -> int: ...
    @property
    def num_logged(self) -> int: ...
    @property
    def stream(self) -> int: ...
    def has(self, out: Out) -> bool: ...
    def tensor(
        self,
        out: Out,
        shape: Sequence[int],
        type: tuple[int, int],
        skip_bytes: int = ...,
        strides: Sequence[int] = ...,
    ) -> Tensor: ...
    def routing_tensors(
        self,
        num_tokens: int,
        num_topk: int,
        num_recv: int,
        num_rows: int,
        num_ranks: int,
        num_local: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: ...
    def use_on(self, stream: int) -> None: ...
    def routing(self) -> Routing: ...

class Routing: ...

class Out:
    def __init__(self, value: int) -> None: ...
    def __int__(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...
    X: ClassVar[Out]
    SCALES: ClassVar[Out]
    IDS: ClassVar[Out]
    WEIGHTS: ClassVar[Out]
    SRC: ClassVar[Out]
    ROWS: ClassVar[Out]
    ROW_INDEX: ClassVar[Out]
    ROW_TOKEN: ClassVar[Out]
    RAIL_LOG: ClassVar[Out]
    SEND_ROW: ClassVar[Out]
    RANK_COUNTS: ClassVar[Out]
    COUNTS: ClassVar[Out]
    OFFSETS: ClassVar[Out]
    SOURCE_RANGE: ClassVar[Out]
    RANK_ENDS: ClassVar[Out]
    NUMBERS: ClassVar[Out]

BEGUN_AT: int

class DispatchPlan:
    def __init__(
        self, args: DispatchArgs, wants: DispatchWants, x: Tensor, scales: Tensor | None
    ) -> None: ...
    def run(
        self,
        rank: DeviceRank,
        x: object,
        topk_idx: object,
        topk_weights: object,
        scales: object,
        recv_stats: object,
        wait_stats: object,
        routing: Routing | None,
    ) -> Flight | None: ...

class CombinePlan:
    def __init__(self, args: CombineArgs, wants: CombineWants, x: Tensor) -> None: ...
    def run(
        self,
        rank: DeviceRank,
        routing: Routing,
        x: object,
        topk_idx: object,
        topk_weights: object,
        row_weights: object,
        wait_stats: object,
        out: object,
    ) -> int | None: ...

def has_plans() -> bool: ...

class RailSetup:
    def __init__(self, shape: RailShape, kernels: int, keeps: object) -> None: ...

class Trouble:
    def __init__(self) -> None: ...
    seed: int
    max_held: int
    max_delay_ns: int
    stalled_peer: int
    is_silent: bool
    is_mapped: bool
    lost_from: int

class LoopbackRails:
    def __init__(
        self, shape: RailShape, rank: int, segments: Sequence[DeviceMemory], max_blocks: int
    ) -> None: ...
    def setup(self) -> RailSetup: ...
    def set_trouble(self, trouble: Trouble) -> None: ...

MAX_REPORTS: int

class DeviceRank:
    def __init__(
        self,
        shape: Shape,
        rank: int,
        generation: int,
        expert_owner: Sequence[int],
        peers: Sequence[tuple[DeviceMemory | None, DeviceMemory | None, int, int, int, int]],
        arena: DeviceArena,
        clocks: tuple[float, float, float],
        max_blocks: int,
        late: Callable[[OpKind, int, float], None],
        rails: RailSetup | None = ...,
    ) -> None: ...
    def dispatch(self, args: DispatchArgs, wants: DispatchWants, stream: int) -> Flight | None: ...
    def push_copies(self, flight: Flight) -> None: ...
    def has_report(self, flight: Flight) -> bool: ...
    def await_report(self, flight: Flight) -> None: ...
    def settle(self, flight: Flight) -> None: ...
    def combine(self, args: CombineArgs, wants: CombineWants, stream: int) -> BegunCombine: ...
    def finish_dispatch(self, flight: Flight, stream: int) -> None: ...
    def finish_combine(self, begun: BegunCombine, stream: int) -> None: ...
    def stages_dispatch(self, args: DispatchArgs) -> bool: ...
    def stages_combine(self, args: CombineArgs) -> bool: ...
    def refuse(self, kind: OpKind, why: Outcome, stream: int) -> None: ...
    def take_deferred(self) -> Outcome | None: ...
    def failed(self) -> bool: ...
    def fault(self) -> int: ...
    def verdict(self) -> Outcome: ...
    def interrupt(self) -> None: ...
    def pause_watch(self, paused: bool) -> None: ...
    def leave(self) -> None: ...
    def default_sms(self, kind: OpKind) -> int: ...
    def seq(self) -> int: ...
    def rail_counters(self) -> list[int]: ...

def is_capturing(stream: int) -> bool: ...
