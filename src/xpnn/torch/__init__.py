"""xpnn in place of `torch.nn.functional`: the same functions on PyTorch's tensors, with gradients.

>>> import torch, xpnn.torch
>>> logits = torch.zeros(1, 2, requires_grad=True)
>>> xpnn.torch.cross_entropy(logits, torch.tensor([0])).backward()
>>> logits.grad
tensor([[-0.5000,  0.5000]])
"""

try:
    import torch
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"xpnn.torch needs PyTorch: pip install 'xpnn[torch]' ({error})") from error

from xpnn.torch.activations import (
    celu,
    elu,
    geglu,
    gelu,
    glu,
    hardsigmoid,
    hardswish,
    hardtanh,
    leaky_relu,
    mish,
    relu,
    relu6,
    selu,
    sigmoid,
    silu,
    softplus,
    swiglu,
    tanh,
)
from xpnn.torch.functional import (
    binary_cross_entropy_with_logits,
    causal_lm_loss,
    cross_entropy,
    huber_loss,
    kl_div,
    linear_cross_entropy,
    log_softmax,
    mse_loss,
    nll_loss,
    smooth_l1_loss,
    softmax,
)
from xpnn.torch.norms import layer_norm, rms_norm
from xpnn.torch.patch import patch

__all__ = [
    "binary_cross_entropy_with_logits", "causal_lm_loss", "celu", "cross_entropy", "elu", "geglu", "gelu", "glu",
    "hardsigmoid", "hardswish", "hardtanh", "huber_loss", "kl_div", "layer_norm", "leaky_relu", "linear_cross_entropy",
    "log_softmax", "mish", "mse_loss", "nll_loss", "patch", "relu", "relu6", "rms_norm", "selu", "sigmoid", "silu",
    "smooth_l1_loss", "softmax", "softplus", "swiglu", "tanh",
]  # fmt: skip

del torch
