"""Pretend clusters: many ranks on one machine, as threads of one process or as processes.

Cluster        ranks are threads; quick, and a debugger sees them all
run_processes  ranks are processes; what users run
skew           loads and routings as they really are: Zipf, drift, bursts, domains
"""

from ep_comm.testing.cluster import Cluster
from ep_comm.testing.processes import run_processes
from ep_comm.testing.skew import (
    bursty_load,
    drifted,
    drifting_load,
    routing_trace,
    shifting_load,
    zipf_load,
)

__all__ = [
    "Cluster",
    "bursty_load",
    "drifted",
    "drifting_load",
    "routing_trace",
    "run_processes",
    "shifting_load",
    "zipf_load",
]
