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
    loss = losses if reduction == "none" else losses.sum() / (mass if reduction == "mean" else 1.0)
    asked = {"lse": (return_lse, np.where(counts, lse, 0.0)), "argmax": (return_argmax, best)}
    asked["accuracy"] = (return_accuracy, np.mean((best == own)[counts]))
    more = tuple(value for wanted, value in asked.values() if wanted)
    return (loss, *more) if more else loss


def linear(x: Array, weight: Array, bias: Array | None = None, *, activation: Any = None) -> Array:
    """Einstein's sum, then the activation's own reference."""
    z = np.einsum("...k,nk->...n", x, weight) + (0.0 if bias is None else bias)
    return z if activation is None else ORACLES[activation.__name__](z)


ORACLES: dict[str, Callable[..., Any]] = {
    "sigmoid": lambda x: sp.expit(x),
    "tanh": lambda x: -np.expm1(-2 * x) / (1 + np.exp(-2 * x)),
    "relu": lambda x: x * np.heaviside(x, 0.0),
    "log": lambda x: np.log2(x) * np.log(2.0),
    "softmax": lambda x: sp.softmax(x, axis=-1),
    "log_softmax": lambda x: sp.log_softmax(x, axis=-1),
    "logsumexp": lambda x: sp.logsumexp(x, axis=-1),
    "linear": linear,
    "cross_entropy_probs": lambda probs, target: sp.entr(target).sum(-1) + sp.rel_entr(target, probs).sum(-1),
    "cross_entropy": cross_entropy,
}
