"""Benchmarks: cases defined once, timed beside their peers and beside a measured ceiling.

`xpnn bench` and `pytest benchmarks` run the same `cases`, with the same contenders (`peers`).
"""
