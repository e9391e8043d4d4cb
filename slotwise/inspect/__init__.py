"""Seeing and checking everything: cross-validation, lockstep, bisect, replay, and the pictures of a plan.

What always holds: a tool here looks at the same kernels, plans and engine that generate text, through their own
observer points; it changes nothing of what they compute. One file a tool.
"""
