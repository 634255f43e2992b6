"""Losses of a prediction's distance from its target: squared, Huber's, and smooth L1. Element by element, then reduced."""

from xpnn.backends.kernel import kernel
from xpnn.backends.kinds import Full
from xpnn.kernels.reduction import check_fits, check_reduction, per_term, reduced

REDUCTIONS: tuple[dict[str, str], ...] = ({}, {"reduction": "sum"}, {"reduction": "none"})


def check_weight(name, shapes):
    """PyTorch's rule: a weight for each prediction, not repeated."""
    weight = shapes.get("weight", shapes["x"])
    if weight != shapes["x"]:
        raise ValueError(f"{name}: weight: got shape {weight}, expected x's {shapes['x']}")


def check_mse(kinds, shapes, options):
    """The arguments of a mean squared error; a mean divides by the weights as passed, so they may not be repeated."""
    check_reduction("mse_loss", options["reduction"])
    check_weight("mse_loss", shapes)
    if "weight" in shapes and options["reduction"] == "mean":
        check_fits("mse_loss", "target", shapes, "x")


@kernel(outputs=("loss",), check=check_mse, wrt=("x",), domain={"weight": "unit"}, variants=REDUCTIONS)
def mse_loss(xp, x, target, *, weight: Full = None, reduction="mean"):
    """The squared error (x − t)², of each element or reduced.

    Parameters
    ----------
    x
        Predictions, of any shape.
    target
        t, of a shape that broadcasts with that of `x`.
    weight
        A factor for each term, of the shape of `x`, or None.
    reduction
        "mean": over all terms, or with weights Σ w (x − t)² / Σ w. "sum", or "none" for the terms themselves.

    Returns
    -------
    array
        The loss, 0-d unless the reduction is "none". The mean of nothing is NaN.

    Notes
    -----
    Semantics are those of `torch.nn.functional.mse_loss` in PyTorch 2.13.

    Examples
    --------
    >>> import xpnn
    >>> xpnn.mse_loss([1.0, 2.0], [1.0, 5.0])
    np.float64(4.5)
    """
    z = x - target
    if weight is None:
        return reduced(xp, z * z, reduction)
    return reduced(xp, weight * (z * z), reduction, xp.sum(weight, axis=None))


@mse_loss.backward
def mse_loss_backward(xp, dloss, x, target, weight, *, reduction="mean"):
    """∂(x − t)²/∂x = 2 (x − t), and its negative for t.

    The weighted mean L = Σ w z² / W with W = Σ w has ∂L/∂w = z² / W − Σ w z² / W² = (z² − L) / W.
    """
    z = x - target
    if weight is None:
        dx = 2.0 * z * per_term(dloss, z, reduction)
        return dx, -dx, None
    mass = xp.sum(weight, axis=None)
    share = per_term(dloss, z, reduction, mass)
    dx = 2.0 * z * weight * share
    above = z * z - reduced(xp, weight * (z * z), reduction, mass) if reduction == "mean" else z * z
    return dx, -dx, above * share


def check_huber(kinds, shapes, options):
    """PyTorch's rules for the arguments of Huber's loss."""
    check_reduction("huber_loss", options["reduction"])
    check_weight("huber_loss", shapes)
    if not options["delta"] > 0:
        raise ValueError(f"huber_loss: delta: got {options['delta']}, expected a number above zero")


@kernel(
    outputs=("loss",),
    check=check_huber,
    wrt=("x",),
    domain={"weight": "unit"},
    variants=tuple({"delta": 0.3, **options} for options in REDUCTIONS),
)
def huber_loss(xp, x, target, *, reduction="mean", delta=1.0, weight: Full = None):
    """Huber's loss: z²/2 where |z| < δ with z = x − t, and δ (|z| − δ/2), its tangent, beyond.

    Parameters
    ----------
    x
        Predictions, of any shape.
    target
        t, of a shape that broadcasts with that of `x`.
    reduction
        "mean" (over the number of terms, weighted or not), "sum", or "none" for the terms themselves.
    delta
        δ > 0, where the parabola ends.
    weight
        A factor for each term, of the shape of `x`, or None.

    Returns
    -------
    array
        The loss, 0-d unless the reduction is "none". The mean of nothing is NaN.

    Notes
    -----
    Semantics are those of `torch.nn.functional.huber_loss` in PyTorch 2.13.

    Examples
    --------
    >>> import xpnn
    >>> xpnn.huber_loss([0.5, -3.0], [0.0, 0.0], reduction="none")
    array([0.125, 2.5  ])
    """
    terms = huber(xp, x - target, delta)
    return reduced(xp, terms if weight is None else weight * terms, reduction)


@huber_loss.backward
def huber_loss_backward(xp, dloss, x, target, weight, *, reduction="mean", delta=1.0):
    """The slope is z on the parabola and ±δ on its tangents: z held within ±δ. A weight's gradient is its term."""
    z = x - target
    share = per_term(dloss, z, reduction)
    dx = within(xp, z, delta) * (share if weight is None else weight * share)
    return dx, -dx, None if weight is None else share * huber(xp, z, delta)


def check_smooth_l1(kinds, shapes, options):
    """PyTorch's rules for the arguments of smooth L1."""
    check_reduction("smooth_l1_loss", options["reduction"])
    if not options["beta"] >= 0:
        raise ValueError(f"smooth_l1_loss: beta: got {options['beta']}, expected zero or a number above")


@kernel(
    outputs=("loss",),
    check=check_smooth_l1,
    off={"beta": 0.0},
    wrt=("x",),
    variants=(*({"beta": 0.3, **options} for options in REDUCTIONS), {"beta": 0.0}),
)
def smooth_l1_loss(xp, x, target, *, reduction="mean", beta=1.0):
    """|z| with z = x − t, its corner rounded off: z² / (2β) where |z| < β, and |z| − β/2 beyond.

    Parameters
    ----------
    x
        Predictions, of any shape.
    target
        t, of a shape that broadcasts with that of `x`.
    reduction
        "mean" (over the number of terms), "sum", or "none" for the terms themselves.
    beta
        β ≥ 0, where the parabola ends. With 0 the loss is |z|, whose slope at 0 is taken to be 0.

    Returns
    -------
    array
        The loss, 0-d unless the reduction is "none". The mean of nothing is NaN.

    Notes
    -----
    This is Huber's loss for δ = β, divided by β. Semantics are those of `torch.nn.functional.smooth_l1_loss`, but for
    β = 0 the gradient of a NaN, which is NaN here and 0 there.

    Examples
    --------
    >>> import xpnn
    >>> xpnn.smooth_l1_loss([0.5, -3.0], [0.0, 0.0], reduction="none", beta=2.0)
    array([0.0625, 2.    ])
    """
    z = x - target
    return reduced(xp, huber(xp, z, beta) / beta if beta else xp.abs(z), reduction)


@smooth_l1_loss.backward
def smooth_l1_loss_backward(xp, dloss, x, target, *, reduction="mean", beta=1.0):
    """The slope is z / β on the parabola and ±1 beyond: z held within ±β, over β. For β = 0 it is the sign of z."""
    z = x - target
    slope = within(xp, z, beta) / beta if beta else xp.where(z > 0, 1.0, xp.where(z < 0, -1.0, z))  # 0 and NaN stay
    dx = slope * per_term(dloss, z, reduction)
    return dx, -dx


def huber(xp, z, delta):
    """z²/2 where |z| < δ, else δ (|z| − δ/2): with c = z held within ±δ, which is the slope, both are c (z − c/2)."""
    c = within(xp, z, delta)
    return c * (z - 0.5 * c)


def within(xp, z, limit):
    """z held between −limit and limit; NaN stays NaN."""
    return xp.where(z > limit, limit, xp.where(z < -limit, -limit, z))
