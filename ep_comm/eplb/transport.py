"""Bytes between ranks, as rows of a dispatch: no other library, no other connection.

A row is `hidden` float32 elements, which every buffer takes and nobody computes with. Rows name the
physical expert that stands first on their destination, so no placement is asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ep_comm.buffer import Buffer


def row_bytes(buffer: Buffer) -> int:
    """Bytes of a row that `send_rows` takes."""
    return 4 * buffer.hidden


def send_rows(buffer: Buffer, rows: Tensor, dst: Tensor, tag: str) -> list[Tensor]:
    """Send each row to a rank.

    Args:
        rows: uint8 [n, row_bytes] on the buffer's device, n <= max_tokens.
        dst: int64 [n] ranks.
    Returns:
        uint8 [m, row_bytes] for each source rank, in the order in which it sent them.

    Collective; one dispatch.
    """
    per_rank = buffer.num_experts // buffer.num_ranks
    ids = (dst * per_rank).unsqueeze(1)
    x = rows.view(torch.float32)
    recv = buffer.dispatch(x, ids, layer=None, output="torch", tag=tag)
    counts = recv.handle.rank_counts[1].tolist()
    return list(torch.split(recv.x.view(torch.uint8), counts))


def gather_bytes(buffer: Buffer, data: Tensor, tag: str) -> Tensor:
    """Everybody's bytes.

    Args:
        data: uint8 [n], on the buffer's device, n the same on all ranks.
    Returns:
        uint8 [num_ranks, n].

    Collective; as many dispatches as num_ranks * n bytes take with max_tokens rows each.
    """
    width, ranks = row_bytes(buffer), buffer.num_ranks
    num_rows = math.ceil(data.numel() / width)
    padded = torch.nn.functional.pad(data, (0, num_rows * width - data.numel()))
    rows = padded.view(num_rows, width)
    parts: list[list[Tensor]] = [[] for _ in range(ranks)]
    everything = torch.arange(num_rows * ranks, device=data.device)
    for piece in torch.split(everything, buffer.max_tokens):
        came = send_rows(buffer, rows[piece // ranks].contiguous(), piece % ranks, tag)
        for source, got in enumerate(came):
            parts[source].append(got)
    whole = [torch.cat(p).flatten()[: data.numel()] for p in parts]
    return torch.stack(whole)


def reduce_sum(buffer: Buffer, values: Tensor, tag: str) -> Tensor:
    """The sum of a tensor over all ranks, in rank order: the same bits everywhere. Collective."""
    data = values.contiguous().view(torch.uint8).flatten()
    everybody = gather_bytes(buffer, data, tag)
    terms: Sequence[Tensor] = everybody.view(values.dtype).view(-1, *values.shape).unbind(0)
    total = torch.zeros_like(values)
    for term in terms:
        total += term
    return total
