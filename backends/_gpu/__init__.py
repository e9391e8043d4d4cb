"""What the GPU backends share: one chain of launches as a CUDA graph, and the walk from a call to its launches.

Not a backend: it has no kernels, and the loader passes over folders whose names start with an underscore.
"""
