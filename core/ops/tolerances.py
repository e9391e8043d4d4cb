"""Default tolerances of op contracts, per dtype, with their reasons.

Owns the ladders that contracts choose from. What always holds: they bound the distance from the float64 oracle
run on the same rounded inputs, so they speak of a kernel's own arithmetic and the rounding of its output.
"""

from __future__ import annotations

from slotwise.core.contract import EXACT, Tolerance
from slotwise.core.specs import DType

# One rounding of the output and a few operations before it: 2**-8 is half a unit in the last place of bf16.
POINTWISE = {
    DType.F64: Tolerance(1e-12, 1e-12),
    DType.F32: Tolerance(1e-5, 1e-5),
    DType.F16: Tolerance(1e-3, 2e-3),
    DType.BF16: Tolerance(1e-2, 1.6e-2),
}

# A dot product accumulated in float32: errors grow with sqrt(K); cases keep inputs near unit variance and K below 1024,
# so one absolute bound (float32: about 1e-6 * sqrt(K)) serves all of them.
REDUCTION = {
    DType.F64: Tolerance(1e-10, 1e-10),
    DType.F32: Tolerance(1e-4, 1e-4),
    DType.F16: Tolerance(2e-2, 4e-3),
    DType.BF16: Tolerance(1.5e-1, 1.6e-2),
}

# Copies, table look-ups, cache writes, argmax and counts have no arithmetic to excuse a difference.
BIT_EQUAL = dict.fromkeys((DType.F64, DType.F32, DType.F16, DType.BF16), EXACT)

# Quantised weights. A kernel may round activations to int8 by group for its dot products: 127 codes for the greatest
# |x| of 32, so each element is off by at most amax / 254, evenly spread: a standard deviation of amax / 440. In a
# product of unit variance, with activations of unit variance (amax is then about 2.1, seldom above 4), that makes 0.005
# to 0.009 whatever K is; a hundred thousand elements stay within 0.04. Beside that, rounding the output is small, so
# one bound serves all dtypes. A lost group of K <= 1024 shifts outputs by 0.18 or more (one standard deviation).
INT8_ACTIVATIONS = dict.fromkeys((DType.F64, DType.F32, DType.F16, DType.BF16), Tolerance(5e-2, 1.6e-2))
