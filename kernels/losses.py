"""Cross-entropy: of probabilities as the notes derive it, and of logits, fused with softmax."""

import numbers
import sys

from xpnn.backends.kernel import kernel
from xpnn.backends.kinds import Column, Full, Index, Row, Scalar
from xpnn.kernels.normalizers import exp_minus_max
from xpnn.kernels.reduction import check_reduction


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


MOST = 2**24  # classes that float32 numbers


def check_options(kinds, shapes, options, name="cross_entropy"):
    """PyTorch's rules for the arguments of a cross-entropy."""
    reduction, ignore_index, softcap = options["reduction"], options["ignore_index"], options["softcap"]
    check_reduction(name, reduction)
    if options["label_smoothing"] > 1:
        raise ValueError(f"{name}: label_smoothing: got {options['label_smoothing']}, expected at most 1.0")
    if not options["label_smoothing"] > 0:  # as PyTorch does, negative and NaN too
        options["label_smoothing"] = 0.0
    if softcap is not None:
        if isinstance(softcap, bool) or not isinstance(softcap, numbers.Real) or not softcap > 0:
            raise ValueError(f"{name}: softcap: got {softcap!r}, expected a positive number or None")
        options["softcap"] = None if softcap > sys.float_info.max else float(softcap)
    if (options["return_argmax"] or options["return_accuracy"]) and max(shapes["logits"], default=1) > MOST:
        raise ValueError(f"{name}: logits: got shape {shapes['logits']}, expected at most {MOST} classes for an argmax")
    if kinds["target"] is Full:
        if shapes["target"] != shapes["logits"]:
            raise ValueError(
                f"{name}: target: got probabilities of shape {shapes['target']}, expected logits' {shapes['logits']}"
            )
        if ignore_index >= 0:
            raise ValueError(f"{name}: ignore_index: got {ignore_index}, expected none with probability targets")


@kernel(
    outputs=("loss", "lse", "argmax", "accuracy"),
    check=check_options,
    saved=("m", "s"),
    off={"label_smoothing": 0.0, "z_loss": 0.0},
    wrt=("logits",),
    domain={"target": "positive", "weight": "positive", "divisor": "positive"},
    variants=(
        {},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.2, "reduction": "none"},
        {"z_loss": 0.01},
        {"softcap": 4.0, "return_lse": True},
        {"reduction": "none", "return_lse": True},
        {"return_argmax": True, "return_accuracy": True},
        {"reduction": "sum", "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 4.0},
    ),
)
def cross_entropy(
    xp,
    logits,
    target: Index | Full,
    *,
    weight: Column = None,
    row_scale: Row = None,
    divisor: Scalar = None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    return_lse=False,
    return_argmax=False,
    return_accuracy=False,
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
        A weight for each class, or None. A constant: it has no gradient.
    row_scale
        A factor on each row's loss, of the shape of the loss under "none", or None; the mean divides by what it divides
        by without.
    divisor
        What the mean divides by, one number, such as the rows that count in all batches whose gradients are added up; or
        None for those of this call. A constant.
    ignore_index
        Rows with this target count nothing: loss and gradient are 0, even where their logits are NaN.
    reduction
        "mean" (over the weights of the rows that count; over all rows for probabilities), "sum", or "none" for one loss
        per row.
    label_smoothing
        ε: the target becomes (1 − ε) of itself and ε of the uniform distribution.
    z_loss
        z: adds z · lse² to each row's loss, whatever its class weights, lse being log Σ exp of its logits.
    softcap
        c: the logits become c · tanh(logits / c) first; None leaves them as they are.
    return_lse
        Return lse too, for each row; 0 for ignored ones. It has a gradient.
    return_argmax
        Return the class of the largest logit of each row too, the first of equals, or of the first NaN.
    return_accuracy
        Return the share of the rows that count whose largest logit is that of their target's class (of the largest
        probability) too; NaN if there are none.
    axis
        The axis that holds the classes; the last by default (PyTorch's is 1).

    Returns
    -------
    loss
        0-d unless the reduction is "none". The mean of no rows is NaN. float32 for logits of half precision.
    lse, argmax, accuracy
        Those that were asked for, after the loss in a tuple.

    Raises
    ------
    IndexError
        For a target outside [0, C) that is not `ignore_index`, before anything is written.

    Notes
    -----
    With m = max x and s = Σ exp(x − m), the loss of a row of class t is log s − (xₜ − m), and the gradient is p − ŷ with
    p = exp(x − m) / s: the notes' y − ŷ. Saving (m, s) rather than m + log s keeps both right for logits near ±1e4.
    Semantics are those of `torch.nn.functional.cross_entropy`, which has no options beyond `label_smoothing`.

    Examples
    --------
    >>> import numpy as np, xpnn
    >>> logits = np.array([[2.0, 0.0], [0.0, 2.0]])
    >>> round(float(xpnn.cross_entropy(logits, np.array([0, 0]))), 4)
    1.1269
    >>> loss, accuracy = xpnn.cross_entropy(logits, np.array([0, 0]), return_accuracy=True)
    >>> float(accuracy)
    0.5
    """
    x = logits if softcap is None else capped(xp, logits, softcap)[0]
    m, e = exp_minus_max(xp, x)
    s = xp.sum(e, axis=-1, keepdims=True)
    valid, w, mass = row_weights(xp, x, target, weight, ignore_index)
    mass = mass if divisor is None else divisor
    loss = row_loss(xp, x, target, weight, w, m, s, label_smoothing, z_loss)
    lse = argmax = accuracy = None
    if row_scale is not None:
        loss = row_scale * loss
    if return_lse:
        lse = m + xp.log(s)
    if valid is not None:
        loss = xp.where(valid, loss, 0.0)
        lse = xp.where(valid, lse, 0.0) if return_lse else None
    if return_argmax or return_accuracy:
        best = xp.argmax(logits, axis=-1, keepdims=True)
        argmax = best if return_argmax else None
    if return_accuracy:
        right = best == target if valid is not None else best == xp.argmax(target, axis=-1, keepdims=True)
        count = x.shape[0]
        if valid is not None:
            right, count = right & valid, xp.sum(xp.astype(valid, x.dtype), axis=None)
        accuracy = xp.sum(xp.astype(right, x.dtype), axis=None) / count
    if reduction != "none":
        loss = xp.sum(loss, axis=None)
    return (loss / mass if reduction == "mean" else loss), lse, argmax, accuracy, m, s


@cross_entropy.backward
def cross_entropy_backward(
    xp,
    dloss,
    logits,
    target,
    weight,
    row_scale,
    divisor,
    dlse,
    m,
    s,
    *,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
):
    """∂loss/∂xⱼ = pⱼ Σₖ ŷₖ − ŷⱼ, with ŷ the target as smoothed and weighted: y − ŷ where ŷ sums to one.

    ∂lse/∂xⱼ = pⱼ, so z · lse² adds 2 z lse pⱼ; and `capped` gives the slope of c tanh(x / c). A target probability's own
    gradient is (1 − ε) wⱼ (log s − (xⱼ − m)), a row's factor's is the row's loss. A row whose class number lies outside
    [0, C), which only unchecked arrays can hold, has gradient 0.
    """
    x, slope = (logits, None) if softcap is None else capped(xp, logits, softcap)
    valid, w, mass = row_weights(xp, x, target, weight, ignore_index)
    mass = mass if divisor is None else divisor
    rows = None if dloss is None else dloss / mass if reduction == "mean" else dloss  # the cotangent of each row's loss
    scale = rows if row_scale is None or rows is None else rows * row_scale
    _, e = exp_minus_max(xp, x, m)
    p = e / s
    dlogits = dtarget = drow_scale = None
    if scale is not None:
        dlogits, dtarget = loss_gradients(xp, x, p, target, weight, w, m, s, label_smoothing, scale)
        if z_loss:
            dlogits = dlogits + 2 * z_loss * (m + xp.log(s)) * scale * p
        if row_scale is not None:
            drow_scale = rows * row_loss(xp, x, target, weight, w, m, s, label_smoothing, z_loss)
    if dlse is not None:
        dlogits = dlse * p if dlogits is None else dlogits + dlse * p
    if slope is not None:
        dlogits = slope * dlogits
    if valid is not None:
        counts = valid & (target >= 0) & (target < logits.shape[-1])
        dlogits = xp.where(counts, dlogits, 0.0)
        drow_scale = None if drow_scale is None else xp.where(counts, drow_scale, 0.0)
    return dlogits, dtarget, None, drow_scale, None


def row_loss(xp, x, target, weight, w, m, s, label_smoothing, z_loss):
    """−Σⱼ ŷⱼ log pⱼ of each row, with log pⱼ = (xⱼ − m) − log s; and z · lse²."""
    log_s = xp.log(s)
    if not xp.isdtype(target.dtype, "integral"):
        loss = xp.sum(smoothed(xp, x, target, weight, label_smoothing) * (log_s - (x - m)), axis=-1, keepdims=True)
    else:
        nll = log_s - (xp.take_along_axis(x, target, axis=-1) - m)
        loss = nll if w is None else w * nll
        if label_smoothing:
            each = log_s - (x - m)
            uniform = xp.sum(each if weight is None else weight * each, axis=-1, keepdims=True)
            loss = (1 - label_smoothing) * loss + label_smoothing / x.shape[-1] * uniform
    if z_loss:
        lse = m + log_s
        loss = loss + z_loss * (lse * lse)
    return loss


def loss_gradients(xp, x, p, target, weight, w, m, s, label_smoothing, scale):
    """What the gradients of −Σⱼ ŷⱼ log pⱼ by x and by target probabilities are for a row's cotangent."""
    if not xp.isdtype(target.dtype, "integral"):
        y = smoothed(xp, x, target, weight, label_smoothing)
        dtarget = scale * (xp.log(s) - (x - m))
        if label_smoothing:
            dtarget = (1 - label_smoothing) * dtarget
        return scale * (p * xp.sum(y, axis=-1, keepdims=True) - y), dtarget if weight is None else weight * dtarget
    columns = x.shape[-1]
    hit = xp.astype(xp.arange(columns) == target, x.dtype)
    if not label_smoothing:
        return (scale if w is None else scale * w) * (p - hit), None
    one = (1 - label_smoothing) * (1.0 if w is None else w)
    spread = label_smoothing / columns * (1.0 if weight is None else weight)
    if weight is not None:  # otherwise the smoothed target still sums to one
        p = p * (one + xp.sum(spread, axis=-1, keepdims=True))
    return scale * (p - (spread + one * hit)), None


def capped(xp, logits, softcap):
    """c · tanh(x / c), and its derivative, each to a few roundings of itself however small it is.

    With b = exp(2|x| / c) − 1, tanh|x / c| = b / (b + 2), where b may stop at a number that is as good as infinity; with
    r = 2 / (b + 2) = 1 − tanh|x / c|, which lies in [0, 1], the derivative is 1 − tanh² = r (2 − r): nothing cancels.
    From tanh itself, 1 − tanh² would carry twice its rounding beside a result near 0.
    """
    b = xp.expm1(2.0 * xp.abs(logits) / softcap)
    r = 2.0 / (b + 2.0)
    limited = xp.minimum(b, 2.0**100)
    t = softcap * (limited / (limited + 2.0))
    return xp.where(logits < 0, -t, t), r * (2.0 - r)


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
