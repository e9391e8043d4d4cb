"""The kernel backends: one folder each, found by looking, with the same file names as the op families in `core/ops`.

What always holds: a backend's folder exposes `BACKEND`, and imports nothing of Slotwise but core; no other part imports
a backend, they are loaded by name (`slotwise.core.backend`). `_gpu/` is no backend: it holds what the GPU ones share.
"""
