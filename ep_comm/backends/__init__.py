"""Backends: ways to move the rows. All take the same checked calls and give the same results.

base        what a backend is
cpu         ranks of one host over shared memory (csrc/cpu)
collective  any torch.distributed group, with all_to_all_single
choose      which of them a buffer gets, and why
"""
