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
    relu,
    sigmoid,
    smooth_l1_loss,
    softmax,
    tanh,
)
from xpnn.torch.patch import patch

__all__ = [
    "binary_cross_entropy_with_logits", "causal_lm_loss", "cross_entropy", "huber_loss", "kl_div", "linear_cross_entropy",
    "log_softmax", "mse_loss", "nll_loss", "patch", "relu", "sigmoid", "smooth_l1_loss", "softmax", "tanh",
]  # fmt: skip

del torch
