"""Losses of predicted probabilities, given as logarithms or as logits: negative log-likelihood, binary, and divergence."""

import math

from xpnn.backends.kernel import kernel
from xpnn.backends.kinds import Column, Full, Index
from xpnn.kernels.losses import row_weights
from xpnn.kernels.reduction import check_fits, check_reduction, per_term, reduced


def check_nll(kinds, shapes, options):
    """PyTorch's rule for the arguments of a negative log-likelihood."""
    check_reduction("nll_loss", options["reduction"])


@kernel(
    outputs=("loss",),
    check=check_nll,
    wrt=("x",),
    domain={"x": "log_simplex", "weight": "positive"},
    variants=({}, {"reduction": "sum"}, {"reduction": "none"}),
)
def nll_loss(xp, x, target: Index, *, weight: Column = None, ignore_index=-100, reduction="mean"):
    """The negative log-likelihood of the target classes: −w_t x_t for a row of class t.

    Parameters
    ----------
    x
        Log-probabilities, such as `log_softmax` gives, of at least one dimension.
    target
        Integers: the class of each row, of the shape of `x` without the axis.
    weight
        A weight for each class, or None.
    ignore_index
        Rows with this target count nothing: loss and gradient are 0.
    reduction
        "mean" (over the weights of the rows that count), "sum", or "none" for one loss per row.
    axis
        The axis that holds the classes; the last by default (PyTorch's is 1).

    Returns
    -------
    array
        The loss, 0-d unless the reduction is "none". The mean of no rows is NaN.

    Raises
    ------
    IndexError
        For a target outside [0, C) that is not `ignore_index`, before anything is written.

    See Also
    --------
    cross_entropy : of logits, with the normalization fused in.

    Notes
    -----
    Semantics are those of `torch.nn.functional.nll_loss`. Class weights are constants: their gradient is None.

    Examples
    --------
    >>> import numpy as np, xpnn
    >>> xpnn.nll_loss(np.array([[-1.0, -0.5], [-2.0, -0.25]]), np.array([0, 1]), reduction="none")
    array([1.  , 0.25])
    """
    valid, w, mass = row_weights(xp, x, target, weight, ignore_index)
    taken = xp.take_along_axis(x, target, axis=-1)
    return reduced(xp, xp.where(valid, -taken if w is None else -taken * w, 0.0), reduction, mass)


@nll_loss.backward
def nll_loss_backward(xp, dloss, x, target, weight, *, ignore_index=-100, reduction="mean"):
    """−w_t at the target class of a row that counts, over Σ w for a mean, and exactly 0 everywhere else."""
    valid, w, mass = row_weights(xp, x, target, weight, ignore_index)
    share = -per_term(dloss, x, reduction, mass)
    hit = valid & (xp.arange(x.shape[-1]) == target)
    return xp.where(hit, share if w is None else share * w, 0.0), None, None


def check_binary(kinds, shapes, options):
    """PyTorch's rules for the arguments of a binary cross-entropy."""
    name, shape = "binary_cross_entropy_with_logits", shapes["logits"]
    check_reduction(name, options["reduction"])
    if shapes["target"] != shape:
        raise ValueError(f"{name}: target: got shape {shapes['target']}, expected logits' {shape}")
    for other in shapes.keys() & {"weight", "pos_weight"}:
        check_fits(name, other, shapes, "logits")


@kernel(
    outputs=("loss",),
    check=check_binary,
    wrt=("logits",),
    domain={"target": "unit", "weight": "positive", "pos_weight": "positive"},
    variants=({}, {"reduction": "sum"}, {"reduction": "none"}),
)
def binary_cross_entropy_with_logits(xp, logits, target, *, weight: Full = None, reduction="mean", pos_weight: Full = None):
    """−[p t log σ(x) + (1 − t) log(1 − σ(x))]: a yes-or-no question for each element, answered by a logit x.

    Parameters
    ----------
    logits
        x, of any shape.
    target
        t, of the same shape: the probability of yes, usually 0 or 1.
    weight
        A factor for each term, of a shape that broadcasts to that of `logits`, or None.
    reduction
        "mean" (over the number of terms), "sum", or "none" for the terms themselves.
    pos_weight
        p, a factor for the share of yes, of a shape that broadcasts to that of `logits`, or None for 1.

    Returns
    -------
    array
        The loss, 0-d unless the reduction is "none". The mean of nothing is NaN.

    Notes
    -----
    −log σ(x) = max(−x, 0) + log(1 + exp(−|x|)) and −log(1 − σ(x)) = max(x, 0) + log(1 + exp(−|x|)): no exponent is above
    zero, and nothing cancels, however large x is. For p = 1 they combine to max(x, 0) − x t + log(1 + exp(−|x|)).
    Semantics are those of `torch.nn.functional.binary_cross_entropy_with_logits`; unlike there, weights have gradients.

    Examples
    --------
    >>> import xpnn
    >>> xpnn.binary_cross_entropy_with_logits([1000.0, -1000.0], [1.0, 1.0], reduction="none")
    array([   0., 1000.])
    """
    terms = binary(xp, logits, target, pos_weight)
    return reduced(xp, terms if weight is None else weight * terms, reduction)


@binary_cross_entropy_with_logits.backward
def binary_cross_entropy_with_logits_backward(xp, dloss, logits, target, weight, pos_weight, *, reduction="mean"):
    """∂/∂x = (1 − t) σ(x) − p t (1 − σ(x)), where σ(x) and 1 − σ(x) are 1 / (1 + e) and e / (1 + e) with e = exp(−|x|).

    ∂/∂t = −p log σ(x) + log(1 − σ(x)), which is −x for p = 1; ∂/∂p = −t log σ(x); a weight's gradient is its term.
    """
    share = per_term(dloss, logits, reduction)
    scale = share if weight is None else weight * share
    yes, no = answers(target, pos_weight)
    e = xp.exp(-xp.abs(logits))
    dlogits = scale * (xp.where(logits >= 0, no - yes * e, no * e - yes) / (1.0 + e))
    dweight = None if weight is None else share * binary(xp, logits, target, pos_weight)
    if pos_weight is None:
        return dlogits, -scale * logits, dweight, None
    miss, alarm = minus_logs(xp, logits)
    return dlogits, scale * (pos_weight * miss - alarm), dweight, scale * (target * miss)


def binary(xp, logits, target, pos_weight):
    """The terms of a binary cross-entropy."""
    miss, alarm = minus_logs(xp, logits)
    yes, no = answers(target, pos_weight)
    return yes * miss + no * alarm


def answers(target, pos_weight):
    """How much of the answer is yes, as weighted, and how much is no."""
    return target if pos_weight is None else pos_weight * target, 1.0 - target


def minus_logs(xp, x):
    """−log σ(x) and −log(1 − σ(x)): what the answers yes and no cost."""
    size = xp.abs(x)
    small = xp.log1p(xp.exp(-size))
    large = size + small
    return xp.where(x >= 0, small, large), xp.where(x >= 0, large, small)


def check_divergence(kinds, shapes, options):
    """The arguments of a divergence. PyTorch's "batchmean" divides by the length of x's first axis, before it broadcasts."""
    check_reduction("kl_div", options["reduction"], ("none", "mean", "sum", "batchmean"))
    if options["reduction"] != "batchmean":
        return
    x, target = shapes["x"], shapes["target"]
    length = x[0] if x else 1
    if length == 0 or (x == target and length == math.prod(x)):  # nothing, or each element a row of its own
        options["reduction"] = "mean"
    elif length == 1 or 0 in x:
        options["reduction"] = "sum"
    elif length != (x if len(x) >= len(target) else target)[0]:
        raise ValueError(f"kl_div: x: got shape {x}, expected target's {target} for reduction 'batchmean'")


@kernel(
    outputs=("loss",),
    check=check_divergence,
    wrt=("x",),
    domain={"x": "log_simplex", "target": "simplex"},
    variants=(
        {},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"reduction": "batchmean"},
        {"log_target": True},
        {"log_target": True, "reduction": "batchmean"},
        {"log_target": True, "reduction": "none"},
    ),
)
def kl_div(xp, x, target, *, reduction="mean", log_target=False):
    """The terms t (log t − x) of the divergence of Kullback and Leibler, for a prediction x = log y.

    Parameters
    ----------
    x
        Log-probabilities, of any shape.
    target
        t, probabilities of a shape that broadcasts with that of `x`; or their logarithms.
    reduction
        "mean" over the number of terms, "batchmean" over the length of the first axis of `x`, which gives the divergence
        itself, "sum", or "none" for the terms themselves.
    log_target
        Whether `target` holds log t.

    Returns
    -------
    array
        The loss, 0-d unless the reduction is "none". The mean of nothing is NaN.

    Notes
    -----
    Where t is zero its term is zero, whatever x is there. Semantics are otherwise those of `torch.nn.functional.kl_div`,
    in which such a term is NaN where x is infinite, and always with log t = −∞.

    Examples
    --------
    >>> import numpy as np, xpnn
    >>> x = np.log([[0.5, 0.5], [0.25, 0.75]])
    >>> xpnn.kl_div(x, np.array([[1.0, 0.0], [0.25, 0.75]]), reduction="batchmean") == np.log(2) / 2
    np.True_
    """
    p = xp.exp(target) if log_target else target
    log_p = target if log_target else xp.log(xp.where(p == 0, 1.0, p))  # with log(0) a GPU would run out of registers
    return reduced(xp, xp.where(p == 0, 0.0, p * (log_p - x)), reduction)


@kl_div.backward
def kl_div_backward(xp, dloss, x, target, *, reduction="mean", log_target=False):
    """∂/∂x = −t and ∂/∂t = log t − x + 1, which is −∞ at t = 0; for u = log t, ∂/∂u = t (u − x + 1)."""
    share = per_term(dloss, target, reduction)
    if not log_target:
        return -share * target, share * (xp.log(target) - x + 1.0)
    p = xp.exp(target)
    return -share * p, share * xp.where(p == 0, 0.0, p * (target - x + 1.0))
