from ep_comm.compat.deep_ep.utils import (
    EventHandle,
    EventOverlap,
    check_nvlink_connections,
    get_logical_domain_size,
    get_physical_domain_size,
)

__all__ = [
    "EventHandle",
    "EventOverlap",
    "check_nvlink_connections",
    "get_logical_domain_size",
    "get_physical_domain_size",
]
