"""Backends: ways to move the rows. All take the same checked calls and give the same results.

base        what a backend is
cpu         ranks of one host over shared memory (csrc/cpu)
collective  any torch.distributed group, with one all-to-all: its exchanges in wire, what ranks
            tell each other first in record, begun operations in worker
nvshmem     the library under buffers that span nodes: its world, ranks among its PEs, memory
choose      which of them a buffer gets, and why
"""
