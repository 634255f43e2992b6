"""The mathematics: one definition of each kernel, forward and backward, as pure functions of an array namespace `xp`.

Every formula is given two-dimensional arrays: (R, C) unless annotated otherwise (see `xpnn.backends.kinds`).
"""

from xpnn.kernels.activations import relu, sigmoid, tanh
from xpnn.kernels.classification import binary_cross_entropy_with_logits, kl_div, nll_loss
from xpnn.kernels.elementary import log
from xpnn.kernels.gates import geglu, gelu, glu, mish, silu, swiglu
from xpnn.kernels.linear import linear
from xpnn.kernels.linear_cross_entropy import linear_cross_entropy
from xpnn.kernels.losses import cross_entropy, cross_entropy_probs, softmax_cross_entropy
from xpnn.kernels.normalizers import log_softmax, logsumexp, softmax, softmax_jacobian
from xpnn.kernels.norms import layer_norm, rms_norm
from xpnn.kernels.optimizers import adagrad, adam, adamw, sgd
from xpnn.kernels.rectifiers import celu, elu, hardsigmoid, hardswish, hardtanh, leaky_relu, relu6, selu, softplus
from xpnn.kernels.regression import huber_loss, mse_loss, smooth_l1_loss

__all__ = [
    "adagrad", "adam", "adamw", "binary_cross_entropy_with_logits", "celu", "cross_entropy", "cross_entropy_probs", "elu",
    "geglu", "gelu", "glu", "hardsigmoid", "hardswish", "hardtanh", "huber_loss", "kl_div", "layer_norm", "leaky_relu",
    "linear", "linear_cross_entropy", "log", "log_softmax", "logsumexp", "mish", "mse_loss", "nll_loss", "relu", "relu6",
    "rms_norm", "selu", "sgd", "sigmoid", "silu", "smooth_l1_loss", "softmax", "softmax_cross_entropy", "softmax_jacobian",
    "softplus", "swiglu", "tanh",
]  # fmt: skip
