"""Dispatch and combine as torch.library ops, under ep_comm.autograd: what a graph can hold.

    ep_comm::dispatch     tokens to their experts, along ids
    ep_comm::redispatch   the same along the routing of a handle; the gradient of combine
    ep_comm::combine      results home, added; the gradient of dispatch

Ops take tensors and scalars only: a buffer is its `Buffer.number`, a handle its eight tensors.
Each has an implementation (the buffer's call), a fake one (shapes; sizes that depend on what
arrives are unbacked symbols) and a gradient made of the other ops. They are functional: no result
shares memory with an argument or another result, and what an option leaves out is an empty tensor.

An op is a collective: every rank runs it, in the same order. A graph knows the order of ops only
from their data, so in graphs ep_comm::pass_turn stands behind every op: `library.TURN`.
"""

import ep_comm.ops.combine  # noqa: F401  # and those its gradient is made of
