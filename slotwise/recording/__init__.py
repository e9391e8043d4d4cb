"""Writing down what a run decides, and reading it back: the line format, the recorder, the crash recorder.

What always holds: a recording is made of what the engine tells its observers, and changes nothing of what is
generated; `slotwise.inspect` has the tools that replay, compare and draw one. `docs/recordings.md` says what a line
holds.
"""
