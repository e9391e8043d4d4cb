"""Proving: how kernels and passes are judged against the ops' own definitions.

An unlowered graph run by its ops' functions, a kernel on a case between guard zones, and the measures of how far two
results are apart. What always holds: the judge is the op's plain function in float64, never another kernel.
"""
