"""The audit of machine code: what GPU kernels were compiled to, held against a budget.

What always holds: it needs no GPU; a backend joins it with a module `ahead` that compiles its kernels for a call
(`GENERATIONS` and `compile_call`); all backends share one table and one budget file.
"""
