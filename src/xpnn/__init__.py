"""xpnn: neural-network kernels, forward and backward, written once, run composed or fused.

>>> import numpy as np, xpnn
>>> xpnn.softmax(np.array([[0.0, 0.0]]))
array([[0.5, 0.5]])
"""

from xpnn import init, testing
from xpnn.backends.choice import set_backend, use_backend
from xpnn.backends.kernel import Kernel, kernel
from xpnn.backends.kinds import Column, Full, Index, Matrix, Row, Scalar
from xpnn.backends.recording import SubsetError
from xpnn.backends.task import BackendError
from xpnn.diagnosis import diagnose
from xpnn.kernels import (
    adagrad,
    adam,
    adamw,
    binary_cross_entropy_with_logits,
    celu,
    cross_entropy,
    cross_entropy_probs,
    elu,
    geglu,
    gelu,
    glu,
    hardsigmoid,
    hardswish,
    hardtanh,
    huber_loss,
    kl_div,
    layer_norm,
    leaky_relu,
    linear,
    linear_cross_entropy,
    log,
    log_softmax,
    logsumexp,
    mish,
    mse_loss,
    nll_loss,
    relu,
    relu6,
    rms_norm,
    selu,
    sgd,
    sigmoid,
    silu,
    smooth_l1_loss,
    softmax,
    softmax_cross_entropy,
    softmax_jacobian,
    softplus,
    swiglu,
    tanh,
)

__version__ = "0.1.0"

__all__ = [
    "BackendError", "Column", "Full", "Index", "Kernel", "Matrix", "Row", "Scalar", "SubsetError", "adagrad", "adam",
    "adamw", "binary_cross_entropy_with_logits", "celu", "cross_entropy", "cross_entropy_probs", "diagnose", "elu", "geglu",
    "gelu", "glu", "hardsigmoid", "hardswish", "hardtanh", "huber_loss", "init", "kernel", "kl_div", "layer_norm",
    "leaky_relu", "linear", "linear_cross_entropy", "log", "log_softmax", "logsumexp", "mish", "mse_loss", "nll_loss",
    "relu", "relu6", "rms_norm", "selu", "set_backend", "sgd", "sigmoid", "silu", "smooth_l1_loss", "softmax",
    "softmax_cross_entropy", "softmax_jacobian", "softplus", "swiglu", "tanh", "testing", "use_backend",
]  # fmt: skip
