"""A linear layer and the cross-entropy of its logits, which are never held as a whole."""

from numbers import Integral

from xpnn.backends.chunked import ByChunks
from xpnn.backends.kernel import kernel
from xpnn.backends.kinds import Column, Full, Index, Matrix, Wide
from xpnn.kernels.linear import linear
from xpnn.kernels.losses import check_options, cross_entropy, row_weights

NAME = "linear_cross_entropy"


def check_linear_options(kinds, shapes, options):
    """The loss's own rules, for logits that there are not; and those of the chunks."""
    size, x, linear_weight = options["chunk_size"], shapes["x"], shapes["linear_weight"]
    if size is not None:
        if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
            raise ValueError(f"{NAME}: chunk_size: got {size!r}, expected a positive integer or None")
        options["chunk_size"] = int(size)
    if not x:
        raise ValueError(f"{NAME}: x: got shape (), expected at least one dimension")
    if len(linear_weight) != 2 or linear_weight[1] != x[-1] or not linear_weight[0]:
        raise ValueError(f"{NAME}: linear_weight: got shape {linear_weight}, expected (C, {x[-1]}), with at least one class")
    for name in ("linear_bias", "weight"):
        if name in shapes and shapes[name] != linear_weight[:1]:
            raise ValueError(f"{NAME}: {name}: got shape {shapes[name]}, expected {linear_weight[:1]}")
    logits = (*x[:-1], linear_weight[0])
    target = Full if kinds["target"] is Wide else kinds["target"]
    never = {"return_argmax": False, "return_accuracy": False}
    chosen = options | never
    check_options(kinds | {"target": target}, shapes | {"logits": logits}, chosen, NAME)
    options.update((n, v) for n, v in chosen.items() if n in options)


def mass_of(xp, like, target, weight, options):
    """What the mean divides by."""
    return row_weights(xp, like, target, weight, options["ignore_index"])[2]


@kernel(
    outputs=("loss",),
    check=check_linear_options,
    driver=ByChunks(linear, cross_entropy, mass_of),
    off={"label_smoothing": 0.0, "z_loss": 0.0},
    wrt=("x", "linear_weight", "linear_bias"),
    domain={"target": "simplex", "weight": "unit"},
    variants=(
        {},
        {"reduction": "sum", "chunk_size": 3},
        {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 16.0, "reduction": "none", "chunk_size": 2},
        {"reduction": "none", "chunk_size": 2},
        {"chunk_size": 2},
    ),
)
def linear_cross_entropy(
    xp,
    x,
    linear_weight: Matrix,
    target: Index | Wide,
    *,
    linear_bias: Column = None,
    weight: Column = None,
    reduction="mean",
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    chunk_size=None,
):
    """Cross-entropy of the logits x Wᵀ + b, computed by chunks of rows: their logits are all that is ever held.

    Parameters
    ----------
    x
        Of shape (..., D): any number of leading dimensions, none for one example.
    linear_weight
        W, of shape (C, D).
    target
        Integers: the class of each row, of the shape of `x` without its last axis. Or floats: probabilities, (..., C).
    linear_bias
        b, of shape (C,), or None.
    weight
        A weight for each class, or None. A constant: it has no gradient.
    reduction, ignore_index, label_smoothing, z_loss, softcap
        As for `xpnn.cross_entropy`.
    chunk_size
        Rows whose logits are held at once; None for as many as fit into a twentieth of all logits' memory, or into 48 MiB
        where that is more.

    Returns
    -------
    array
        The loss, 0-d unless the reduction is "none". The mean of no rows is NaN. float32 for half precision.

    Raises
    ------
    IndexError
        For a target outside [0, C) that is not `ignore_index`, before anything is written.

    See Also
    --------
    cross_entropy : of logits that are there anyway.

    Notes
    -----
    `value_and_grad` is the way to train: three products for loss and gradients. `vjp` keeps no logits, so its pullback
    makes them again, a fourth product, and takes any cotangent, one per row under "none". The gradient by W is added up in
    float32 whatever the dtype. On NumPy arrays of half precision, logits are float32 too. The arguments are those of
    `torch.nn.functional.linear_cross_entropy`, and z_loss and softcap.

    An ignored row's own gradient is exactly 0, even where its x is NaN. W's is a product with all rows of x, as it is for
    `xpnn.linear` and in PyTorch: there, 0 · NaN is NaN. So keep NaN out of padding.

    Examples
    --------
    >>> import numpy as np, xpnn
    >>> x, weight, target = np.ones((4, 2)), np.eye(3, 2), np.array([0, 1, 2, 2])
    >>> loss, (dx, dweight) = xpnn.linear_cross_entropy.value_and_grad(x, weight, target)
    >>> np.allclose(loss, xpnn.cross_entropy(xpnn.linear(x, weight), target))
    True
    """
    logits = linear.forward_formula(xp, x, linear_weight, linear_bias)[0]
    loss, *_ = cross_entropy.forward_formula(
        xp, logits, target, weight=weight, reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing,
        z_loss=z_loss, softcap=softcap,
    )  # fmt: skip
    return loss


@linear_cross_entropy.backward
def linear_cross_entropy_backward(
    xp,
    dloss,
    x,
    linear_weight,
    target,
    linear_bias,
    weight,
    *,
    reduction="mean",
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
):
    """dlogits is cross_entropy's; then dx = dlogits W, dW = dlogitsᵀ x and db = Σ dlogits over the rows."""
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap}
    logits = linear.forward_formula(xp, x, linear_weight, linear_bias)[0]
    *_, m, s = cross_entropy.forward_formula(xp, logits, target, weight=weight, reduction=reduction, **options)
    dlogits, dtarget, *_ = cross_entropy.backward_formula(
        xp, dloss=dloss, dlse=None, logits=logits, target=target, weight=weight, row_scale=None, divisor=None, m=m, s=s,
        reduction=reduction, **options,
    )  # fmt: skip
    dx, dweight, dbias = linear.backward_formula(xp, dy=dlogits, x=x, weight=linear_weight, bias=linear_bias, y=None, z=None)
    return dx, dweight, dtarget, dbias, None
