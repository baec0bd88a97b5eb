"""Rates and latencies of one rank's GPU, its NVLink ports and its NICs."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ep_comm.errors import make_error


@dataclass(frozen=True)
class Hardware:
    """GB/s are 10⁹ bytes per second and direction, both directions busy; `_us` are microseconds.

    Defaults: H200, NVLink4 with 18 links, one 400 Gb/s NIC for each GPU. NVLink, SM and flag
    figures were measured on two such GPUs with bare copies; those of the NIC are its nominal rate
    and a usual latency, to be replaced by what the cluster measures.

    Fitted to whole calls on the same two GPUs, commit 9377d92, for the smallest error of the worst
    call, to a quarter of a percent: the three overheads of large batches to 4096 and 8192 tokens
    (these of 3ed1c99, their kernels the same), BF16 and FP8 (bench/results/nvlink_gpus.jsonl),
    `sm_push_gbps` to those of 803f363; the two overheads of small batches, `small_row_us` and
    `small_sm_gbps` to calls in a CUDA graph of 1 to 1024 tokens
    (bench/results/nvlink_latency.jsonl) and of 128 on 16, 32 and 64 SMs (nvlink_gpus.jsonl).

    Differences of those records, not fitted: `small_slab_us`, what slabs of FP8 take more than
    compact rows with 1 to 16 tokens; `small_start_us`, what a graph saves more of 128 tokens where
    the library chooses the SMs. `memory_gbps` is nominal; any from 4400 to 5200 fits as well, to
    half a percent.
    """

    nvlink_push_gbps: float = 370.0  # stores into a peer
    nvlink_pull_gbps: float = 318.0  # loads from a peer
    nic_gbps: float = 50.0  # of all NICs of a rank together; 400 Gb/s = 50
    sm_push_gbps: float = 50.0  # one SM storing into a peer
    sm_store_gbps: float = 50.0  # one SM storing into its own memory
    sm_load_gbps: float = 50.0  # one SM loading, from anywhere
    memory_gbps: float = 4800.0  # the GPU's own memory, all SMs together
    num_sms: int = 132
    flag_us: float = 1.2  # from a release to its acquire, over NVLink
    nic_us: float = 4.0  # the same over the network, payload with signal
    put_us: float = 1.0  # a warp's time to hand one put to the NIC
    dispatch_overhead_us: float = 30.6  # kernels started, counts exchanged, records read
    cached_overhead_us: float = 20.9  # the same with a handle
    combine_overhead_us: float = 8.5
    small_dispatch_overhead_us: float = 6.3  # of a small batch: rows wait for no counts
    small_combine_overhead_us: float = 4.3
    small_slab_us: float = 0.5  # more for rows by expert: quantized, or added up before they return
    small_start_us: float = 2.0  # more where SMs are given: no start before the kernel ahead ends
    small_row_us: float = 2.1  # what bytes of a small batch take at least: those of one row
    small_sm_gbps: float = 66.0  # one SM in a small batch, loads and stores together

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            zero_is_fine = field.name.endswith("_us")
            good = isinstance(value, int | float) and 0 <= value < float("inf")
            if not good or (value == 0 and not zero_is_fine):
                want = "a number >= 0" if zero_is_fine else "a number > 0"
                raise make_error("E203", f"rejected {field.name}={value!r}: want {want}")

    def op_overhead_us(self, op: str, *, is_small: bool = False) -> float:
        """Of "dispatch", "dispatch_cached" or "combine" inside one node, in µs."""
        if is_small:
            is_combine = op == "combine"
            return self.small_combine_overhead_us if is_combine else self.small_dispatch_overhead_us
        if op == "dispatch":
            return self.dispatch_overhead_us
        return self.cached_overhead_us if op == "dispatch_cached" else self.combine_overhead_us
