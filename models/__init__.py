"""From a checkpoint folder to a graph, weights, a tokenizer and a chat template.

What always holds: checkpoints are hostile input, checked before memory is committed, and nothing is unpickled; each
architecture is one file (a module with `ARCHITECTURES`) and one graph. `models/load.py` is the way in.
"""
