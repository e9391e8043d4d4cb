"""From a model graph to a plan: the middle room.

Owns the plan and its text, JSON and diff, the ordered list of passes, the checks, options and presets. What always
holds: a plan is frozen and a function of (graphs, options, kernel tables); no backend is imported here, only their
kernel tables are read; `plan.verify()` passes for every plan that `compile_plan` returns.
"""
