"""Tests of GPU backends without a GPU: ep_comm on kernels that a CPU runs, host memory as a GPU's.

`pytest --emulator` puts it in place; csrc/README.md says what it is and what it cannot show.
"""
