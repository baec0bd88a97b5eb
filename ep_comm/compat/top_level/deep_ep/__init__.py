"""`deep_ep` by ep_comm: names only, everything is in ep_comm.compat.deep_ep."""

from ep_comm.compat.deep_ep import (
    Buffer,
    Config,
    EventHandle,
    EventOverlap,
    __version__,
    get_logical_domain_size,
    get_physical_domain_size,
    topk_idx_t,
)

from . import buffer, utils

__all__ = [
    "Buffer",
    "Config",
    "EventHandle",
    "EventOverlap",
    "__version__",
    "buffer",
    "get_logical_domain_size",
    "get_physical_domain_size",
    "topk_idx_t",
    "utils",
]
