"""The oracle: dispatch and combine for all ranks at once in plain torch, clear before fast.

    routing   what a source decides from its own top-k: who gets which token, in which order
    rows      what a receiver decides from the counts: bases, capacity, rows of each layout, handle
    sums      combine: which rows go back, and the order in which they are added
    fp8       quantization per block
    oracle    the four above, for all ranks, with every exchange an index into a list

The first three describe one rank each and know of no communication, so the `collective` backend
runs the same functions with real exchanges in between: every rule of the library is written once.
One rank's call, with what it exchanges on the right:

    sends = plan_sends(topk_idx, experts)                   -> its last two fields, the counts
    receives = plan_receive(<counts>, options)              -> token_base, expert_base
    metadata_to(sends, rank, topk_weights) for every rank   -> those rows of x, scales, metadata
    send_row = send_rows(sends, layout, <bases>); make_handle(...); arrange(...)
    rows_for_source(handle, meta, rank) for every rank      -> those rows of y
    add_in_order(<contributions>, plan_from_handle(handle, experts), layout)
"""

from ep_comm.reference.fp8 import dequantize, quantize
from ep_comm.reference.oracle import combine, dispatch
from ep_comm.reference.routing import ExpertOwner, expert_owner

__all__ = ["ExpertOwner", "combine", "dequantize", "dispatch", "expert_owner", "quantize"]
