"""The mathematics: one definition of each kernel, forward and backward, as pure functions of an array namespace `xp`.

Every formula is given two-dimensional arrays: (R, C) unless annotated otherwise (see `xpnn.backends.kinds`).
"""

from xpnn.kernels.activations import relu, sigmoid, tanh
from xpnn.kernels.elementary import log
from xpnn.kernels.linear import linear
from xpnn.kernels.linear_cross_entropy import linear_cross_entropy
from xpnn.kernels.losses import cross_entropy, cross_entropy_probs, softmax_cross_entropy
from xpnn.kernels.normalizers import log_softmax, logsumexp, softmax, softmax_jacobian

__all__ = [
    "cross_entropy", "cross_entropy_probs", "linear", "linear_cross_entropy", "log", "log_softmax", "logsumexp", "relu", "sigmoid", "softmax",
    "softmax_cross_entropy", "softmax_jacobian", "tanh",
]  # fmt: skip
