"""Independent references: one line for each kernel, on the caller's arrays, in float64 or wider."""

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.special as sp

Array = np.ndarray[Any, Any]


def cross_entropy(
    logits: Array,
    target: Array,
    weight: Array | None = None,
    row_scale: Any = 1.0,
    divisor: Any = None,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = np.inf,
    return_lse: bool = False,
    return_argmax: bool = False,
    return_accuracy: bool = False,
) -> Any:
    """Row by row, as PyTorch documents it; what PyTorch lacks, by its definition."""
    columns = logits.shape[-1]
    w = np.ones(columns) if weight is None else weight
    logits = softcap * (1 - 2 / (np.exp(2 * logits / softcap) + 1)) if np.isfinite(softcap) else logits
    lse = sp.logsumexp(logits, axis=-1)
    log_p = logits - lse[..., None]
    best = np.array([next(j for j in range(columns) if row[j] == row.max()) for row in logits])
    if target.dtype.kind == "f":
        mixed = (1 - label_smoothing) * target + label_smoothing / columns
        losses, mass = -(w * mixed * log_p).sum(-1), len(logits)
        counts, own = np.full(len(logits), True), target.argmax(-1)
    else:
        counts = target != -100
        safe = np.where(counts, target, 0)
        own = -w[safe] * log_p[np.arange(len(logits)), safe]
        losses = (1 - label_smoothing) * own - label_smoothing / columns * (w * log_p).sum(-1)
        mass, own = w[safe][counts].sum(), safe
    losses = np.where(counts, row_scale * (losses + z_loss * lse**2), 0.0)
    mass = mass if divisor is None else divisor
    loss = losses if reduction == "none" else losses.sum() / (mass if reduction == "mean" else 1.0)
    asked = {"lse": (return_lse, np.where(counts, lse, 0.0)), "argmax": (return_argmax, best)}
    asked["accuracy"] = (return_accuracy, np.mean((best == own)[counts]))
    more = tuple(value for wanted, value in asked.values() if wanted)
    return (loss, *more) if more else loss


def linear(x: Array, weight: Array, bias: Array | None = None, *, activation: Any = None) -> Array:
    """Einstein's sum, then the activation's own reference."""
    z = np.einsum("...k,nk->...n", x, weight) + (0.0 if bias is None else bias)
    return z if activation is None else ORACLES[activation.__name__](z)


def nll_loss(x: Array, target: Array, weight: Array | None = None, *, reduction: str = "mean") -> Array:
    """A product with one-hot rows of weights; an ignored row is zero."""
    w = np.eye(x.shape[-1])[np.maximum(target, 0)] * (target != -100)[:, None] * (1.0 if weight is None else weight)
    return reduced(-(w * x).sum(-1), reduction, w.sum())


def reduced(terms: Array, reduction: str, mass: Any = None) -> Array:
    """What is left of the terms of a loss."""
    by = {"sum": 1, "mean": terms.size if mass is None else mass, "batchmean": len(terms)}
    return terms if reduction == "none" else np.sum(terms) / by[reduction]


def binary(logits: Array, target: Array, weight: Any = 1.0, pos_weight: Any = 1.0, *, reduction: str = "mean") -> Array:
    """Between the two answers' entropies."""
    return reduced(-weight * (pos_weight * target * sp.log_expit(logits) + (1 - target) * sp.log_expit(-logits)), reduction)


def layer_norm(x: Array, weight: Any = 1.0, bias: Any = 0.0, *, eps: float = 1e-5) -> Array:
    """By the covariance of each row with itself."""
    spread = np.array([np.cov(row, bias=True) for row in x.reshape(-1, x.shape[-1])]).reshape(*x.shape[:-1], 1)
    return weight * (x - np.average(x, axis=-1)[..., None]) * (spread + eps) ** -0.5 + bias


def elu(x: Array, alpha: float = 1.0, width: float = 1.0) -> Array:
    """A line on the right of 0, an exponential on its left."""
    return np.where(x > 0, x, alpha * (np.exp(np.where(x > 0, 0.0, x) / width) - 1.0))


def gelu(x: Array, approximate: str = "none") -> Array:
    """By SciPy's normal distribution."""
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    return x * sp.ndtr(x) if approximate == "none" else x / (1 + np.exp(-2 * inner))


def sgd(
    param: Array,
    grad: Array,
    momentum_buffer: Array | None = None,
    *,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> Any:
    """As sums of products with the arrays given."""
    sign = -1 if maximize else 1
    kept, new = (0.0, 1.0) if momentum_buffer is None else (momentum, 1 - dampening)
    given = np.stack([param, grad, grad if momentum_buffer is None else momentum_buffer])
    buffer = np.tensordot([new * weight_decay, new * sign, kept], given, 1)
    plain = np.tensordot([weight_decay, sign, 0.0], given, 1)
    if not momentum:
        return param - lr * plain
    return param - lr * (plain + momentum * buffer if nesterov else buffer), buffer


def adagrad(
    param: Array,
    grad: Array,
    state_sum: Array,
    *,
    step: int = 1,
    lr: float = 1e-2,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    eps: float = 1e-10,
    maximize: bool = False,
) -> tuple[Array, Array]:
    """With the root of the sum as a hypotenuse."""
    g = weight_decay * param + (-grad if maximize else grad)
    root = np.hypot(np.sqrt(state_sum), g)
    return param - np.divide(lr * g, (root + eps) * (1 + step * lr_decay - lr_decay)), root**2


def adam(
    param: Array,
    grad: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    max_exp_avg_sq: Array | None = None,
    *,
    step: int = 1,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> tuple[Array, ...]:
    """With both averages corrected, as in the paper's algorithm."""
    g = weight_decay * param + (-grad if maximize else grad)
    m, v = exp_avg - (1 - beta1) * (exp_avg - g), exp_avg_sq - (1 - beta2) * (exp_avg_sq - g**2)
    most = () if max_exp_avg_sq is None else (np.fmax(max_exp_avg_sq, v),)
    m_hat, v_hat = m / -np.expm1(step * np.log(beta1)), (most[0] if most else v) / -np.expm1(step * np.log(beta2))
    return (param - np.divide(lr * m_hat, np.sqrt(v_hat) + eps), m, v, *most)


ORACLES: dict[str, Callable[..., Any]] = {
    "sigmoid": lambda x: sp.expit(x),
    "tanh": lambda x: -np.expm1(-2 * x) / (1 + np.exp(-2 * x)),
    "relu": lambda x: x * np.heaviside(x, 0.0),
    "leaky_relu": lambda x, negative_slope=0.01: np.maximum(x, 0.0) + negative_slope * np.minimum(x, 0.0),
    "elu": elu,
    "selu": lambda x: 1.0507009873554805 * elu(x, 1.6732632423543772),
    "celu": lambda x, alpha=1.0: elu(x, alpha, alpha),
    "softplus": lambda x, beta=1.0, threshold=20.0: np.where(beta * x > threshold, x, -sp.log_expit(-beta * x) / beta),
    "hardtanh": lambda x, min_val=-1.0, max_val=1.0: np.median(np.broadcast_arrays(min_val, x, max_val), axis=0),
    "relu6": lambda x: np.clip(x, 0.0, 6.0),
    "hardsigmoid": lambda x: np.clip(x + 3.0, 0.0, 6.0) / 6.0,
    "hardswish": lambda x: x * np.clip(x / 6.0 + 0.5, 0.0, 1.0),
    "gelu": gelu,
    "silu": lambda x: x / (1.0 + np.exp(-x)),
    "mish": lambda x: x * np.tanh(np.logaddexp(0.0, x)),
    "swiglu": lambda gate, up: sp.expit(gate) * gate * up,
    "geglu": lambda gate, up, approximate="none": gelu(gate, approximate) * up,
    "glu": lambda a, b: a * sp.expit(b),
    "log": lambda x: np.log2(x) * np.log(2.0),
    "softmax": lambda x: sp.softmax(x, axis=-1),
    "log_softmax": lambda x: sp.log_softmax(x, axis=-1),
    "logsumexp": lambda x: sp.logsumexp(x, axis=-1),
    "linear": linear,
    "layer_norm": layer_norm,
    "rms_norm": lambda x, weight=1.0, eps=2.0**-52: (
        weight * x / np.hypot(np.linalg.norm(x, axis=-1, keepdims=True) / np.sqrt(x.shape[-1]), np.sqrt(eps))
    ),
    "cross_entropy_probs": lambda probs, target: sp.entr(target).sum(-1) + sp.rel_entr(target, probs).sum(-1),
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": lambda x, linear_weight, target, linear_bias=None, weight=None, chunk_size=None, **options: (
        cross_entropy(linear(x, linear_weight, linear_bias), target, weight, **options)
    ),
    "sgd": sgd,
    "adagrad": adagrad,
    "adam": adam,
    "adamw": lambda param, lr=1e-3, weight_decay=1e-2, **more: adam(param * (1 - lr * weight_decay), lr=lr, **more),
    "nll_loss": nll_loss,
    "binary_cross_entropy_with_logits": binary,
    "kl_div": lambda x, target, log_target=False, reduction="mean": reduced(
        np.exp(target) * (target - x) if log_target else -sp.entr(target) - target * x, reduction
    ),
    "mse_loss": lambda x, target, weight=None, reduction="mean": reduced(
        np.subtract(x, target) ** 2 * (1.0 if weight is None else weight), reduction, None if weight is None else weight.sum()
    ),
    "huber_loss": lambda x, target, weight=1.0, reduction="mean", delta=1.0: reduced(
        weight * sp.huber(delta, x - target), reduction
    ),
    "smooth_l1_loss": lambda x, target, reduction="mean", beta=1.0: reduced(
        sp.huber(beta, x - target) / beta if beta else np.abs(x - target), reduction
    ),
}
