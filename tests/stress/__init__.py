"""A long random program over all ranks of a buffer, every result checked: stress_nvlink.py.

draw     what all ranks draw alike: routings and options; rows that tell where they come from
truth    what a rank must get, by torch alone, and the comparison
rounds   kinds of rounds: prepare, call, check
run      the program, on processes or on threads
"""
