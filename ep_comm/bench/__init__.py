"""What `ep-comm bench` is made of. Definitions of the numbers: bench/README.md.

cases      what is measured: shapes, routing, inputs, and the bytes that follow from them
check      every result against the oracle, bit by bit, before anything is timed
timing     clocks, ranks aligned by a barrier, slowest rank of each iteration
copies     the denominator: plain copies of the same rows
gloo       the baseline: all-to-all with torch indexing
memory     peak memory of one call
machine    what ran where
measure    one case on one rank: all of the above in order
report     table, JSON lines, picture
"""
