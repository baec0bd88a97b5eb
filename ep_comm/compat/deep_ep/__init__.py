"""The names a program expects of `deep_ep`: V1, on the native API of ep_comm.

Adapters only: they translate arguments and results, and keep no state that a call could need but
native buffers. V2 (ElasticBuffer) will stand beside `buffer`; its names are absent until it works,
because programs look for them to decide. Importing this needs no GPU, no native code, no group.

buffer        Buffer: construction, utilities, high-throughput dispatch and combine
low_latency   the low_latency_* methods of Buffer
layout        who gets which token, from top-k
handles       the tuple of tensors between dispatch and combine
natives       the native buffers behind one Buffer
events        EventHandle, EventOverlap
config        Config
"""

from ep_comm.compat.deep_ep.buffer import Buffer, topk_idx_t
from ep_comm.compat.deep_ep.config import Config
from ep_comm.compat.deep_ep.events import EventHandle, EventOverlap
from ep_comm.compat.deep_ep.utils import get_logical_domain_size, get_physical_domain_size

__version__ = "1.2.1+epcomm"  # "2." would promise V2

__all__ = [
    "Buffer",
    "Config",
    "EventHandle",
    "EventOverlap",
    "__version__",
    "get_logical_domain_size",
    "get_physical_domain_size",
    "topk_idx_t",
]
