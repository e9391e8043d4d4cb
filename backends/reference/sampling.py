"""From logits to tokens.

Owns the kernels of `filter_logits`, `greedy`, `sample`, `accept_coupled` and `accept_rejection`. What
always holds: PyTorch reduces, sorts and takes logarithms of each row of a batch as of one row alone (tests show it),
and the acceptance functions go through sequences one by one, so every kernel is the function on all rows.
"""

from __future__ import annotations

from slotwise.backends.reference.binding import whole

KERNELS = tuple(whole(op) for op in ("filter_logits", "greedy", "sample", "accept_coupled", "accept_rejection"))
