"""Cross-entropy: of probabilities as the notes derive it, and of logits, fused with softmax."""

from xpnn.backends.kernel import kernel
from xpnn.backends.kinds import Column, Full, Index
from xpnn.kernels.normalizers import exp_minus_max


@kernel(wrt=("probs",), domain={"probs": "simplex", "target": "simplex"})
def cross_entropy_probs(xp, probs, target):
    """H(ŷ, y) = −ŷᵀ log y for each row: `target` is ŷ, the true distribution, and `probs` is y, the prediction.

    Parameters
    ----------
    probs
        y, positive, of at least one dimension.
    target
        ŷ, of the same shape. Where it is zero its term is zero, whatever y is there.
    axis
        The axis that holds the classes; the last by default.

    Returns
    -------
    array
        One value per row: the shape without the axis.

    See Also
    --------
    cross_entropy : from logits, in one pass, accurate where probabilities underflow.

    Examples
    --------
    >>> import numpy as np, xpnn
    >>> xpnn.cross_entropy_probs([0.5, 0.5], [1.0, 0.0]) == np.log(2)
    np.True_
    """
    terms = xp.where(target == 0, 0.0, target * xp.log(probs))
    return -xp.sum(terms, axis=-1, keepdims=True)


@cross_entropy_probs.backward
def cross_entropy_probs_backward(xp, dy, probs, target):
    """dH/dy = −(1/y) ⊙ ŷ = −ŷ / y; and dH/dŷ = −log y."""
    return dy * xp.where(target == 0, 0.0, -target / probs), -dy * xp.log(probs)


def check_options(kinds, shapes, options):
    """PyTorch's rules for the arguments of a cross-entropy."""
    reduction, ignore_index = options["reduction"], options["ignore_index"]
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"cross_entropy: reduction: got {reduction!r}, expected 'none', 'mean' or 'sum'")
    if options["label_smoothing"] > 1:
        raise ValueError(f"cross_entropy: label_smoothing: got {options['label_smoothing']}, expected at most 1.0")
    if not options["label_smoothing"] > 0:  # as PyTorch does, negative and NaN too
        options["label_smoothing"] = 0.0
    if kinds["target"] is Full:
        if shapes["target"] != shapes["logits"]:
            raise ValueError(
                f"cross_entropy: target: got probabilities of shape {shapes['target']}, expected logits' {shapes['logits']}"
            )
        if ignore_index >= 0:
            raise ValueError(f"cross_entropy: ignore_index: got {ignore_index}, expected none with probability targets")


@kernel(
    outputs=("loss",),
    check=check_options,
    saved=("m", "s"),
    off={"label_smoothing": 0.0},
    wrt=("logits",),
    domain={"target": "positive", "weight": "positive"},
    variants=(
        {},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.2, "reduction": "none"},
    ),
)
def cross_entropy(
    xp, logits, target: Index | Full, *, weight: Column = None, ignore_index=-100, reduction="mean", label_smoothing=0.0
):
    """Cross-entropy of logits against class numbers or probabilities: softmax and H(ŷ, y) in one.

    Parameters
    ----------
    logits
        Array of at least one dimension.
    target
        Integers: the class of each row, of the shape of `logits` without the axis. Or floats: probabilities, of the shape
        of `logits`; they need not sum to one.
    weight
        A weight for each class, or None.
    ignore_index
        Rows with this target count nothing: loss and gradient are 0, even where their logits are NaN.
    reduction
        "mean" (over the weights of the rows that count; over all rows for probabilities), "sum", or "none" for one loss
        per row.
    label_smoothing
        ε: the target becomes (1 − ε) of itself and ε of the uniform distribution.
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

    Notes
    -----
    With m = max x and s = Σ exp(x − m), the loss of a row of class t is log s − (xₜ − m), and the gradient is p − ŷ with
    p = exp(x − m) / s: the notes' y − ŷ. Saving (m, s) rather than m + log s keeps both right for logits near ±1e4.
    Semantics are those of `torch.nn.functional.cross_entropy`.

    Examples
    --------
    >>> import numpy as np, xpnn
    >>> logits = np.array([[2.0, 0.0], [0.0, 2.0]])
    >>> round(float(xpnn.cross_entropy(logits, np.array([0, 0]))), 4)
    1.1269
    """
    m, e = exp_minus_max(xp, logits)
    s = xp.sum(e, axis=-1, keepdims=True)
    log_s = xp.log(s)
    valid, w, mass = row_weights(xp, logits, target, weight, ignore_index)
    if valid is None:
        terms = smoothed(xp, logits, target, weight, label_smoothing) * (log_s - (logits - m))
        loss = xp.sum(terms, axis=-1, keepdims=True)
    else:
        nll = log_s - (xp.take_along_axis(logits, target, axis=-1) - m)
        loss = nll if w is None else w * nll
        if label_smoothing:
            each = log_s - (logits - m)
            uniform = xp.sum(each if weight is None else weight * each, axis=-1, keepdims=True) / logits.shape[-1]
            loss = (1 - label_smoothing) * loss + label_smoothing * uniform
        loss = xp.where(valid, loss, 0.0)
    if reduction == "none":
        return loss, m, s
    total = xp.sum(loss, axis=None)
    return (total / mass if reduction == "mean" else total), m, s


@cross_entropy.backward
def cross_entropy_backward(
    xp, dloss, logits, target, weight, m, s, *, ignore_index=-100, reduction="mean", label_smoothing=0.0
):
    """∂loss/∂xⱼ = pⱼ Σₖ ŷₖ − ŷⱼ, with ŷ the target as smoothed and weighted: y − ŷ where ŷ sums to one.

    A target probability's own gradient is (1 − ε) wⱼ (log s − (xⱼ − m)). A row whose class number lies outside [0, C),
    which only unchecked arrays can hold, has gradient 0.
    """
    valid, w, mass = row_weights(xp, logits, target, weight, ignore_index)
    scale = dloss / mass if reduction == "mean" else dloss
    _, e = exp_minus_max(xp, logits, m)
    p = e / s
    if valid is None:
        y = smoothed(xp, logits, target, weight, label_smoothing)
        dlogits = scale * (p * xp.sum(y, axis=-1, keepdims=True) - y)
        dtarget = scale * (xp.log(s) - (logits - m))
        if label_smoothing:
            dtarget = (1 - label_smoothing) * dtarget
        return dlogits, dtarget if weight is None else weight * dtarget, None
    columns = logits.shape[-1]
    hit = xp.astype(xp.arange(columns) == target, logits.dtype)
    counts = valid & (target >= 0) & (target < columns)
    if label_smoothing:
        one = (1 - label_smoothing) * (1.0 if w is None else w)
        spread = label_smoothing / columns * (1.0 if weight is None else weight)
        if weight is not None:  # otherwise the smoothed target still sums to one
            p = p * (one + xp.sum(spread, axis=-1, keepdims=True))
        dlogits = scale * (p - (spread + one * hit))
    else:
        dlogits = (scale if w is None else scale * w) * (p - hit)
    return xp.where(counts, dlogits, 0.0), None, None


def row_weights(xp, logits, target, weight, ignore_index):
    """Which rows count, with what weight, and the sum of weights that the mean divides by.

    For probabilities there is nothing to ignore: (None, None, number of rows).
    """
    if not xp.isdtype(target.dtype, "integral"):
        return None, None, logits.shape[0]
    valid = target != ignore_index
    if weight is None:
        return valid, None, xp.sum(xp.astype(valid, logits.dtype), axis=None)
    w = xp.take(weight, target, axis=-1)
    return valid, w, xp.sum(xp.where(valid, w, 0.0), axis=None)


def smoothed(xp, logits, target, weight, label_smoothing):
    """Probability targets as they enter the loss: mixed with the uniform distribution, then weighted."""
    if label_smoothing:
        target = (1 - label_smoothing) * target + label_smoothing / logits.shape[-1]
    return target if weight is None else weight * target


softmax_cross_entropy = cross_entropy
