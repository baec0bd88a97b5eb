"""Tests marked gpu that do not run on the emulator, by what it lacks for them.

A name without parameters stands for all of them; `*` stands for anything.
"""

from __future__ import annotations

# The same again in other shapes: skipped without --slow, so that the rest takes minutes.
SLOW: tuple[str, ...] = (
    "test_hybrid_loopback.py::test_clusters_of_every_shape[4-4]",
    "test_hybrid_loopback.py::test_clusters_of_every_shape[8-2]",
    "test_nvlink_copies.py::test_rows_are_those_of_the_reference[*-begun]",
    "test_nvlink_eplb.py::test_replicas_and_load_are_those_of_the_reference[*-int32]",
)

LACKS: dict[str, tuple[str, ...]] = {
    "it captures no graphs": (
        "test_compat_gpus.py::test_low_latency_calls_are_captured_and_replayed",
        "test_hybrid_loopback.py::test_graph_replays_across_nodes",
        "test_nvlink_begun.py::test_e1_begun_operations_are_captured",
        "test_nvlink_begun.py::test_e5_replay_after_close_touches_nothing",
        "test_nvlink_begun.py::test_graph_of_a_closed_buffer_ends_and_the_next_capture_begins",
        "test_nvlink_eplb.py::test_graph_replays_choose_replicas_and_count",
        "test_nvlink_graphs.py::test_ten_thousand_replays_with_changing_routing",
        "test_nvlink_loopback.py::test_graph_replays_with_changing_routing",
        "test_nvlink_memory.py::test_memory_of_a_closed_buffer_comes_back_with_its_last_graph",
        "test_nvlink_plans.py::test_sizes_are_not_waited_for_in_a_capture",
        "test_nvlink_stress.py::test_ranks_that_share_a_gpu",
    ),
    "it does not know how much memory is free": (
        "test_nvlink_memory.py::test_arena_is_given_back_and_taken_again",
        "test_nvlink_memory.py::test_arena_of_threads_is_given_back_and_taken_again",
        "test_nvlink_memory.py::test_f1_no_memory_on_one_rank_is_told_on_all",
    ),
    "its kernels have no names": (
        "test_nvlink_kernels.py::test_usual_calls_run_kernels_of_their_own",
    ),
    "its memory has descriptors always": (
        "test_nvlink_memory.py::test_ipc_handles_serve_where_descriptors_are_refused",
    ),
    "it has no context to break": (
        "test_nvlink_faults.py::test_c7_any_call_with_a_broken_context_says_so",
        "test_nvlink_faults.py::test_c7_broken_context_is_blamed_on_its_rank",
    ),
    "it loads no kernels, and runs none of others": (
        "test_nvlink_beside_nccl.py::test_no_first_call_waits_for_a_kernel_that_runs",
    ),
    "it is not in programs of their own": (
        "test_bench_gpus.py::*",
        "test_nvlink_memory.py::test_g2_fallback_is_collective_and_says_why",
        "test_nvlink_sanitizer.py::*",
    ),
    "it is too slow for what a test expects of time": (
        "test_nvlink_loopback.py::test_statistics_are_added_to_what_there_was",
    ),
}
