"""Analyses: what can be known of a program from its graph, computed on demand. They read, and decide nothing.

What they say of time, memory or work is predicted, and says so where it is printed; XLA decides.
"""
