"""Slots: who owns them, what a step does to them, and the proof that it may.

The product's own idea in one room: the ledger and its pages, the symbolic step over affine lengths with its prover,
the bindings and rows of steps that run, and what proves the one and checks the other. What always holds: every slot is
reserved before it is written and every reservation ends; what checks a step reads the ledger, never the code that made
the numbers.
"""
