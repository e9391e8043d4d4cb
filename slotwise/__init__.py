"""Slotwise: a compiler for language-model decoding in which every KV-cache slot is accounted for."""

__version__ = "0.1.0"
