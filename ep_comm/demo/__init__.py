"""What `ep-comm demo` runs: a small language model trained over several ranks, and again on one.

model    byte-level transformer with MoE layers, over one or several shards of a batch
train    the training loop of a rank, with every sum in one order
picture  losses and the load of the experts over time
"""
