"""What ranks of the collective backend tell each other first, and what follows from it.

Every rank gets every rank's record, so all judge alike, and before a row moves.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from ep_comm import _core
from ep_comm.backends.wire import Finding
from ep_comm.checks import BufferSpec

KINDS: Final = ("none", "dispatch", "combine")  # a kind's code is its index, as in OpKind
WEIGHTS, STATIC, CACHED, WEIGHTED, PER_RANK = 1, 2, 4, 8, 16  # bits of the flags of a descriptor
_FIELDS: Final = _core.DESCRIPTOR_FIELDS
_REASON: Final = _core.REASON_BYTES


@dataclass
class Record:
    """One rank's call and counts. It has the same length for every operation, failed ones too."""

    kind: int  # index in KINDS
    code: int = 0  # why this rank's call cannot be, 0 = it can
    detail: Sequence[int] = (0, 0, 0, 0)
    reason: str = ""
    seq: int = 0
    descriptor: Sequence[int] = (0,) * len(_FIELDS)
    num_tokens: int = 0
    rows_to: Tensor | None = None  # int64 [R] rows it will send to each rank
    rows_from: Tensor | None = None  # int64 [R] rows it expects, known with a handle; else -1
    selections: Tensor | None = None  # int64 [E] of each expert, a fresh dispatch

    def pack(self, num_ranks: int, num_experts: int) -> Tensor:
        """int64 [words], on the device of the counts."""
        text = self.reason.encode()[:_REASON].decode(errors="ignore").encode()
        reason = struct.unpack(f"<{_REASON // 8}q", text.ljust(_REASON, b"\0"))
        head = [self.seq, self.kind, self.code, self.num_tokens, *self.detail]
        words = [torch.tensor([*head, *self.descriptor, *reason])]
        for counts, size, fill in (
            (self.rows_to, num_ranks, 0),
            (self.rows_from, num_ranks, -1),
            (self.selections, num_experts, 0),
        ):
            words.append(torch.full((size,), fill) if counts is None else counts.cpu())
        return torch.cat(words)

    @classmethod
    def unpack(cls, words: Tensor, num_ranks: int) -> Record:
        num_head = 8 + len(_FIELDS) + _REASON // 8
        seq, kind, code, num_tokens, *rest = words[:num_head].tolist()
        text = struct.pack(f"<{_REASON // 8}q", *rest[4 + len(_FIELDS) :])
        counts = words[num_head:]
        return cls(
            seq=seq,
            kind=kind,
            code=code,
            detail=rest[:4],
            reason=text.rstrip(b"\0").decode(errors="replace"),
            descriptor=rest[4 : 4 + len(_FIELDS)],
            num_tokens=num_tokens,
            rows_to=counts[:num_ranks],
            rows_from=counts[num_ranks : 2 * num_ranks],
            selections=counts[2 * num_ranks :],
        )


def judge(spec: BufferSpec, mine: Record, records: Sequence[Record]) -> Finding | None:
    """What is wrong with an operation; every rank reads the same records and judges alike."""
    for p, record in enumerate(records):
        if record.kind != mine.kind:
            return Finding(330, p, want=mine.kind, have=record.kind)
        if record.seq != mine.seq:
            return Finding(241, p, want=mine.seq, have=record.seq)
    for p, record in enumerate(records):
        if record.code != 0:
            return Finding(record.code, p, detail=tuple(record.detail), reason=record.reason)
    for p, record in enumerate(records):
        for i, (ours, theirs) in enumerate(zip(mine.descriptor, record.descriptor, strict=True)):
            if ours != theirs:
                return Finding(220, p, want=ours, have=theirs, detail=(i, 0, 0, 0))
    return _judge_counts(spec, records)


def _judge_counts(spec: BufferSpec, records: Sequence[Record]) -> Finding | None:
    """Counts of peers are untrusted: nothing is computed from a number that cannot be."""
    topk = records[0].descriptor[_FIELDS.index("top_k")]
    sent = torch.stack([counts_of(r.rows_to) for r in records])  # [source, owner]
    expected = torch.stack([counts_of(r.rows_from) for r in records]).T
    for p, record in enumerate(records):
        # Combine sends rows of other ranks' tokens, of each up to one per slot.
        tokens = record.num_tokens if record.kind == 1 else spec.max_tokens * topk
        limit = min(tokens, spec.max_tokens * topk)
        for counts, most in ((sent[p], limit), (counts_of(record.selections), limit * topk)):
            for number in (int(counts.min()), int(counts.max())):
                if not 0 <= number <= most:
                    return Finding(240, p, want=most, have=number)
    wrong = ((expected >= 0) & (expected != sent)).nonzero()
    if wrong.shape[0] > 0:
        source, owner = wrong[0].tolist()
        return Finding(
            242, source, want=int(expected[source, owner]), have=int(sent[source, owner])
        )
    return None


def counts_of(counts: Tensor | None) -> Tensor:
    """Counts of a record that came over the wire, where none is missing."""
    assert counts is not None
    return counts


def describe(**fields: int) -> list[int]:
    """The signature of a call in the order of the contract; what is left out is 0."""
    return [fields.get(name, 0) for name in _FIELDS]
