"""Config: numbers of a transport we do not have, and the sizes programs compute from them."""

from __future__ import annotations

from ep_comm.compat.deep_ep.layout import RANKS_PER_NODE

_ALIGN = 128
_RECORD_BYTES = 512  # what travels beside a row: index, 32 experts and weights, scales


def round_up(size: int, multiple: int = _ALIGN) -> int:
    return -(-size // multiple) * multiple


class Config:
    """How many SMs a call may use; chunk sizes are accepted and mean nothing here.

    Any values are accepted. Rows go straight to their final place, so there is no staging to size:
    the hints are what an implementation with staging would ask for, and `Buffer` only echoes them.
    """

    def __init__(
        self,
        num_sms: int = 20,
        num_max_nvl_chunked_send_tokens: int = 6,
        num_max_nvl_chunked_recv_tokens: int = 256,
        num_max_rdma_chunked_send_tokens: int = 6,
        num_max_rdma_chunked_recv_tokens: int = 256,
    ) -> None:
        self.num_sms = num_sms
        self.num_max_nvl_chunked_send_tokens = num_max_nvl_chunked_send_tokens
        self.num_max_nvl_chunked_recv_tokens = num_max_nvl_chunked_recv_tokens
        self.num_max_rdma_chunked_send_tokens = num_max_rdma_chunked_send_tokens
        self.num_max_rdma_chunked_recv_tokens = num_max_rdma_chunked_recv_tokens

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes of staging inside a node; grows with both arguments."""
        peers = min(num_ranks, RANKS_PER_NODE)
        return self._staging(hidden_bytes, peers, self.num_max_nvl_chunked_recv_tokens)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes of staging between nodes; 0 for one node."""
        if num_ranks <= RANKS_PER_NODE:
            return 0
        num_nodes = -(-num_ranks // RANKS_PER_NODE)
        return 2 * self._staging(hidden_bytes, num_nodes, self.num_max_rdma_chunked_recv_tokens)

    def _staging(self, hidden_bytes: int, peers: int, tokens: int) -> int:
        channels = max(self.num_sms // 2, 1)
        return round_up(channels * peers * max(tokens, 1) * (hidden_bytes + _RECORD_BYTES))

    def __repr__(self) -> str:
        return f"Config({', '.join(f'{name}={value}' for name, value in vars(self).items())})"
