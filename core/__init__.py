"""The bottom room: what every other part speaks.

Owns dtypes and tensor specs, the graph IR with its checker and printer, op contracts, the interface of a backend, and
layouts of weights. What always holds: nothing here imports any other part of Slotwise.
"""
