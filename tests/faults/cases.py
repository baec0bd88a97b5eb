"""The fault matrix: every case by its id, what must come of it, and what it needs to run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Case:
    """A row of the matrix.

    Args:
        what: the fault.
        expected: what callers may rely on.
        needs: "" = every machine can run it; else what it takes, or what of it does not exist yet.
    """

    what: str
    expected: str
    needs: str = ""


GPU: Final = "one GPU"
GPUS: Final = "two GPUs"
NODES: Final = "the backend between nodes, which does not exist yet"

# One line per case, however long: it is a table.
CASES: Final[dict[str, Case]] = {
    "A1": Case("x in a dtype that cannot travel", "E200 with the list"),
    "A2": Case("x strided, on another device", "E202 naming the tensor"),
    "A3": Case("hidden 8, 2880, 3584, 6656; no multiple of 16 bytes", "exact; E211"),
    "A4": Case("topk_idx int32, int64; int16", "exact; E200"),
    "A5": Case("topk_weights [T, K-1]", "E201"),
    "A6": Case("weights bf16, fp16; fp64", "converted; E200"),
    "A7": Case("no tokens on one rank, all, all but one", "exact"),
    "A8": Case("exactly max_tokens; one more", "exact; E230 everywhere, next call works"),
    "A9": Case("top-k 1, 32, more than experts; 33", "exact; E210"),
    "A10": Case("expert ids E, E+1e6, INT_MAX, 2^40, -2, INT_MIN", "counted and named: E213 everywhere"),
    "A11": Case("ids all -1; some -1", "zeros for those tokens"),
    "A12": Case("an expert twice in one token", "every slot counts"),
    "A13": Case("everything to one expert, to one rank", "exact, no deadlock"),
    "A14": Case("experts not divisible by ranks, fewer than ranks, scattered", "the map is followed"),
    "A15": Case("NaN, Inf, denormals, -0.0; a NaN weight", "bit for bit, confined to its token"),
    "A16": Case("scales: any strides; wrong dtype, shape", "verbatim; E200, E201"),
    "A17": Case("handle foreign, old, damaged", "E320 everywhere"),
    "A18": Case("combine of fewer or more rows than were received", "E201"),
    "A19": Case("combine twice, dispatch twice with one handle", "exact"),
    "A20": Case("torch fills new memory in deterministic mode", "exact, no NaN"),
    "A21": Case("offsets beyond 2^31 and 2^32 bytes", "exact"),
    "A22": Case("view that is not aligned to 16 bytes", "E202"),
    "B1": Case("capacity differs on one rank at construction", "E221 everywhere, both values"),
    "B2": Case("hidden, device, experts, top-k, map, slots differ", "E221 everywhere, both values"),
    "B3": Case("library, protocol, structs differ", "E222 everywhere, both versions"),
    "B4": Case("environment variables on one rank only", "ignored"),
    "B5": Case("arguments of a call differ", "E220 everywhere, both values"),
    "B6": Case("one rank combines, others dispatch", "E330 naming both"),
    "B7": Case("a call left out; one too many", "E101 or E330, both numbers"),
    "B8": Case("group in another order than the GPUs", "exact", GPUS),
    "B9": Case("overlapping groups, several buffers per process", "independent"),
    "B10": Case("a rank constructs alone", "E120 listing the absent"),
    "B11": Case("wrong world size, rank taken twice", "E406"),
    "C1": Case("killed, or raising anything, before and during construction", "E110, or E111, within 2 s; killed before it is known: E120"),
    "C2": Case("killed in dispatch, any moment", "E110 naming it, within 1 s, survivors healthy"),
    "C3": Case("killed in combine, any moment", "the same"),
    "C4": Case("stopped and continued", "a warning at most, exact"),
    "C5": Case("stopped for ever", "E101 or E102, 'alive but stopped'"),
    "C6": Case("exception between operations", "E111 with the last operation"),
    "C7": Case("a user's kernel faults on one rank", "that rank is blamed: E112", GPU),
    "C8": Case("_exit, sys.exit, ^C", "E110 or E111, nobody hangs"),
    "C9": Case("fork, use in the child", "E341"),
    "C10": Case("a rank is killed, survivors rebuild, again and again", "works, nothing leaks"),
    "C11": Case("close() by one rank; from another thread, a handler, the end of the program", "E111 for peers; E340 for a call that waits"),
    "D1": Case("jitter before every call", "exact"),
    "D2": Case("a rank late on its first call", "W101 naming it, exact"),
    "D3": Case("low GPU clock", "timeouts within 5 %", GPU),
    "D4": Case("NCCL alongside, opposite order", "no deadlock", GPUS),
    "D5": Case("SMs held by a persistent kernel", "exact or a deadline error", GPU),
    "D6": Case("threads of a rank share a buffer", "serialized, exact"),
    "D7": Case("2 to 4 micro-batches on 2 and 4 slots", "exact"),
    "D8": Case("sequence numbers at 2^31-5, 2^32-5, 2^62", "exact across the wrap"),
    "D9": Case("random programs for long", "no mismatch, flat memory"),
    "E1": Case("CUDA graph: 10 000 replays, new routing", "exact", GPU),
    "E2": Case("graphs of several sizes on one buffer", "exact", GPU),
    "E3": Case("construction while capturing", "E301", GPU),
    "E4": Case("one rank replays, others call", "exact", GPUS),
    "E5": Case("replay after close", "E302 or E340, no fault", GPU),
    "E6": Case("torch.compile, fake tensors, autograd twice", "exact"),
    "F1": Case("allocation fails on one rank at construction", "E232 everywhere, memory back"),
    "F2": Case("allocation fails in dispatch, in combine", "E231 everywhere, next call works"),
    "F3": Case("constructed and closed 1000 times", "memory and descriptors flat"),
    "F4": Case("expandable segments, asynchronous allocator", "exact", GPU),
    "F5": Case("output freed early on the compute stream", "no race for it", GPU),
    "F6": Case("few descriptors; no locked memory, home, /dev/shm", "exact or E407 everywhere"),
    "G1": Case("NVLink hidden for one pair", "loud fallback; E404 if required", GPUS),
    "G2": Case("peer access claimed, write test fails", "fallback", GPUS),
    "G3": Case("MIG, shared GPU, MPS", "exact or E409", GPU),
    "G4": Case("a symbol of the driver is missing", "feature off, said so"),
    "G5": Case("unknown architecture (PTX)", "exact or E403", GPU),
    "G6": Case("private PID namespaces, hidden processes, equal hostnames", "exact, deaths still seen"),
    "G7": Case("no GPU", "import works; E401 on use"),
    "G8": Case("locale; spaces, quotes, `;` in paths and names", "nothing is interpreted"),
    "G9": Case("junk in variables and options", "ignored by a Buffer, told by the doctor; E203"),
    "G10": Case("foreign NCCL preloaded, or none", "irrelevant", GPU),
    "H1": Case("bits flipped in rows, records, counts, numbers", "paranoid: E240 to E242"),
    "H2": Case("hostile counts, offsets, rows", "bounded, E240, nothing outside is touched"),
    "H3": Case("arrival seen before its rows", "impossible; litmus test"),
    "H4": Case("arrival lost", "E102 naming the pair, both counts"),
    "H5": Case("numbers and stores of an older operation or buffer", "ignored, or E241"),
    "N1": Case("NVSHMEM absent", "one host is exact without it"),
    "N2": Case("NVSHMEM host and device versions differ", "E501", NODES),
    "N3": Case("killed in the middle of a put between nodes", "E110, context healthy", NODES),
    "N4": Case("error completion injected", "E503, no spin", NODES),
    "N5": Case("network cards differ between ranks", "E502", NODES),
    "S1": Case("bootstrap of random, cut, oversized, pickled bytes", "E406, nothing runs"),
    "S2": Case("folders that look like a cache: of another user, world-writable, a symlink", "neither read nor written: the library keeps no file"),
    "S3": Case("another user at the socket", "refused"),
    "S4": Case("a peer resizes shared memory", "impossible: sealed"),
}  # fmt: skip

_HEADS: Final = re.compile(r"(?:::test_|\[)((?:[a-hns]\d{1,2}(?:[_-]|(?=\])))+)")
_ID: Final = re.compile(r"[a-hns]\d{1,2}")


def ids_of(nodeid: str) -> list[str]:
    """Cases a test stands for: ids at the head of its name, or of its parameters.

    `::test_c2_c3_a_rank_...` and `::test_bad_argument[a5-weights]`; what looks alike (test_e4m3,
    test_s7_1 of the security rules) is none.
    """
    found = [i.upper() for head in _HEADS.findall(nodeid) for i in _ID.findall(head)]
    return [i for i in found if i in CASES]
