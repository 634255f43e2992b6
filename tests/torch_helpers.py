"""What tests of xpnn.torch share: tensors, a call of every function, and PyTorch's to compare with."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", minversion="2.13", reason="torch 2.13 is not installed: xpnn.torch is not tested")
import torch.nn.functional as F  # noqa: E402, N812

import xpnn.torch as ours  # noqa: E402

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float64, torch.float32, *HALF)


def random(*shape, seed=0, dtype=torch.float64, grad=True):
    values = torch.from_numpy(np.array(np.random.default_rng(seed).standard_normal(shape))).to(dtype)
    return values.requires_grad_(grad)


def unit(*shape, seed=0, dtype=torch.float64, grad=True):
    return torch.sigmoid(random(*shape, seed=seed, grad=False)).to(dtype).requires_grad_(grad)


def classes(*shape, of, seed=3):
    return torch.from_numpy(np.asarray(np.random.default_rng(seed).integers(0, of, shape)))


def outcome(function, args, kwargs, seed=9):
    """A function's value, and its gradients for a random cotangent."""
    args, kwargs = ([fresh(a) for a in args], {n: fresh(a) for n, a in kwargs.items()})
    y = function(*args, **kwargs)
    leaves = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.requires_grad]
    y.backward(random(*y.shape, seed=seed, grad=False).to(y.dtype))
    return y.detach(), [a.grad for a in leaves]


def fresh(a):
    return a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a


def wider(a):
    return a.detach().double().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) and a.is_floating_point() else a


LACKING = {  # in PyTorch
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "geglu": lambda gate, up, approximate="none": F.gelu(gate, approximate=approximate) * up,
}


def reference(name):
    return LACKING.get(name) or getattr(F, name)


def check(name, args, kwargs=None, ulps=8.0, terms=0.0):
    """Ours against PyTorch's: dtypes those of the same call, values those of one in float64.

    `terms` is the size of what a result is a difference of.
    """
    kwargs = kwargs or {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch's, of kl_div's "mean"
        y, gradients = outcome(getattr(ours, name), args, kwargs)
        theirs, their_gradients = outcome(reference(name), args, kwargs)
        wide = [wider(a) for a in args], {n: wider(a) for n, a in kwargs.items()}
        truth, true_gradients = outcome(reference(name), *wide)
    for got, like, want in zip([y, *gradients], [theirs, *their_gradients], [truth, *true_gradients], strict=True):
        assert got.dtype == like.dtype
        assert got.shape == like.shape
        # the cotangent is rounded to y's dtype for us, and not for the truth
        tolerance = ulps * torch.finfo(min(y.dtype, got.dtype, key=lambda t: -torch.finfo(t).eps)).eps
        scale = max(terms, float(want.abs().nan_to_num().max())) if want.numel() else 0.0
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


CALLS = {
    "relu": lambda t: ((random(4, 5, dtype=t),), {}),
    "sigmoid": lambda t: ((random(4, 5, dtype=t),), {}),
    "tanh": lambda t: ((random(4, 5, dtype=t),), {}),
    "leaky_relu": lambda t: ((random(4, 5, dtype=t), 0.2), {}),
    "elu": lambda t: ((random(4, 5, dtype=t),), {"alpha": 1.5}),
    "selu": lambda t: ((random(4, 5, dtype=t),), {}),
    "celu": lambda t: ((random(4, 5, dtype=t), 2.0, False), {}),
    "gelu": lambda t: ((random(4, 5, dtype=t),), {"approximate": "tanh"}),
    "silu": lambda t: ((random(4, 5, dtype=t),), {}),
    "mish": lambda t: ((random(4, 5, dtype=t),), {}),
    "softplus": lambda t: ((random(4, 5, dtype=t), 2.0), {"threshold": 3.0}),
    "hardtanh": lambda t: ((random(4, 5, dtype=t), -0.5), {}),
    "hardsigmoid": lambda t: ((random(4, 5, dtype=t),), {}),
    "hardswish": lambda t: ((random(4, 5, dtype=t),), {}),
    "relu6": lambda t: (((8 * random(4, 5, dtype=t, grad=False)).requires_grad_(),), {}),
    "swiglu": lambda t: ((random(4, 5, dtype=t), random(4, 5, seed=1, dtype=t)), {}),
    "geglu": lambda t: ((random(4, 5, dtype=t), random(4, 5, seed=1, dtype=t)), {"approximate": "tanh"}),
    "glu": lambda t: ((random(4, 6, dtype=t), 1), {}),
    "layer_norm": lambda t: ((random(4, 5, dtype=t), (5,), random(5, seed=1, dtype=t)), {"bias": random(5, seed=2, dtype=t)}),
    "rms_norm": lambda t: ((random(4, 5, dtype=t), (5,), random(5, seed=1, dtype=t), 1e-3), {}),
    "softmax": lambda t: ((random(4, 5, dtype=t), 1), {}),
    "log_softmax": lambda t: ((random(4, 5, dtype=t), -1), {}),
    "cross_entropy": lambda t: ((random(4, 5, dtype=t), classes(4, of=5)), {}),
    "linear_cross_entropy": lambda t: (
        (random(6, 3, dtype=t), random(5, 3, seed=1, dtype=t), classes(6, of=5)),
        {"linear_bias": random(5, seed=2, dtype=t)},
    ),
    "nll_loss": lambda t: ((random(4, 5, dtype=t), classes(4, of=5)), {}),
    "mse_loss": lambda t: ((random(4, 5, dtype=t), random(4, 5, seed=1, dtype=t)), {}),
    "huber_loss": lambda t: ((random(4, 5, dtype=t), random(4, 5, seed=1, dtype=t)), {"delta": 0.7}),
    "smooth_l1_loss": lambda t: ((random(4, 5, dtype=t), random(4, 5, seed=1, dtype=t)), {"beta": 0.7}),
    "kl_div": lambda t: ((random(4, 5, dtype=t), unit(4, 5, seed=1, dtype=t)), {}),
    "binary_cross_entropy_with_logits": lambda t: ((random(4, 5, dtype=t), unit(4, 5, seed=1, dtype=t)), {}),
}
LOSSES = [n for n in CALLS if "loss" in n or "entropy" in n or n == "kl_div"]
