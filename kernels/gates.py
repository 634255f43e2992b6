"""Gates: activations that multiply their input by a number between 0 and 1 which they make of it, or another input."""

import math

from xpnn.backends.halves import Halves
from xpnn.backends.kernel import kernel
from xpnn.kernels.activations import sigmoid


@kernel
def silu(xp, x):
    r"""x σ(x), with the logistic function σ; also called swish.

    .. math:: g(x) = \frac{x}{1 + e^{-x}}

    Parameters
    ----------
    x
        Array of any shape.

    Returns
    -------
    array
        Of the shape and floating dtype of `x`.

    Notes
    -----
    Elfwing et al., "Sigmoid-Weighted Linear Units", 2018. As in PyTorch, the result for −∞ is NaN.

    Examples
    --------
    >>> import numpy as np, xpnn
    >>> np.round(xpnn.silu([-1000.0, 1.0, 100.0]), 4)
    array([  0.    ,   0.7311, 100.    ])
    """
    return times_sigmoid(xp, x, xp.exp(-xp.abs(x)))


def times_sigmoid(xp, x, e):
    """x σ(v) for v of the sign of x and e = exp(−|v|): x / (1 + e) above 0; below, n − n e / (1 + e) with n = x e."""
    n = x * e
    t = xp.where(x >= 0, x, e) / (1.0 + e)
    return xp.where(x >= 0, t, n - n * t)


@silu.backward
def silu_backward(xp, dy, x):
    """σ′ = σ(x) σ(−x), so g′ = σ(x) (1 + x σ(−x)).

    With e = exp(−|x|) and q = e / (1 + e), σ(x) is 1 − q above 0 and e (1 − q) below, and σ(−x) is q above and 1 − q below;
    1 − σ(x) would cancel far right. So g′ = t − t q, where t is 1 + x q above 0 and e (1 + x − x q) below.
    """
    e = xp.exp(-xp.abs(x))
    q = e / (1.0 + e)
    t = xp.where(x >= 0, 1.0 + x * q, e * ((1.0 + x) - x * q))
    return dy * (t - t * q)


def both_sides(xp, v, e):
    """σ(v) and σ(−v), which add up to 1: with e = exp(−|v|) one is 1 / (1 + e) and the other e / (1 + e)."""
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return xp.where(v >= 0, larger, smaller), xp.where(v >= 0, smaller, larger)


@kernel
def mish(xp, x):
    r"""x tanh(log(1 + eˣ)).

    .. math:: g(x) = x \, \tanh(\log(1 + e^{x}))

    Parameters
    ----------
    x
        Array of any shape.

    Returns
    -------
    array
        Of the shape and floating dtype of `x`.

    Notes
    -----
    Misra, "Mish: A Self Regularized Non-Monotonic Activation Function", 2020. tanh(log u) = (u² − 1) / (u² + 1): no logarithm
    is taken. With e = exp(−|x|) g(x) is x / (1 + t) above 0, where t = e / (1 + 1/(2e)); below, it is n − n t, where n = x e
    and t = e / (u + 1/u) with u = 1 + e: few numbers are rounded beside the large ones. As in PyTorch, the result for −∞ is
    NaN.

    Examples
    --------
    >>> import numpy as np, xpnn
    >>> np.round(xpnn.mish([-1000.0, 1.0, 100.0]), 4)
    array([  0.    ,   0.8651, 100.    ])
    """
    e = xp.exp(-xp.abs(x))
    n, u = x * e, 1.0 + e
    t = e / (xp.where(x >= 0, 1.0, u) + 1.0 / xp.where(x >= 0, 2.0 * e, u))
    return xp.where(x >= 0, x / (1.0 + t), n - n * t)


@mish.backward
def mish_backward(xp, dy, x):
    """g′ = T + x T′ with T = w (w + 2) / d and T′ = 4 w (1 + w) / d², where w = eˣ and d = w² + 2w + 2.

    Below 0, with e = w, h = 2e² / d and z = (e²/2 + 3e/2 + 2) / d, (e + 2) / d is 1 − e (1/2 − h/4), and 4 (1 + e) / d² is
    1 − e (1 − h z), so that g′ = e (1 + x − e (1/2 + x − h (1/4 + x z))). Above, with e = e⁻ˣ, d = 2e² + 2e + 1 and
    h = 2e² / d, it is 1 − h + h x · 2 (1 + e) / d. What is multiplied by e and h is small, and its rounding with it.
    """
    e = xp.exp(-xp.abs(x))
    u = 1.0 + e
    square = e * e
    i = 1.0 / (u * u + xp.where(x >= 0, square, 1.0))
    h = 2.0 * square * i
    below = e * ((1.0 + x) - e * ((0.5 + x) - h * (0.25 + x * ((2.0 + e * (1.5 + 0.5 * e)) * i))))
    return dy * xp.where(x >= 0, 1.0 - (h - h * x * (2.0 * u * i)), below)


def check_approximate(name):
    """A check that `approximate` is a way to compute gelu, for a kernel of a name."""

    def check(kinds, shapes, options):
        if options["approximate"] not in ("none", "tanh"):
            raise ValueError(f"{name}: approximate: got {options['approximate']!r}, expected 'none' or 'tanh'")

    return check


@kernel(check=check_approximate("gelu"), variants=({}, {"approximate": "tanh"}))
def gelu(xp, x, *, approximate="none"):
    r"""x Φ(x), with Φ the distribution function of the normal distribution, or nearly so.

    .. math:: g(x) = x \, \Phi(x), \quad \Phi(x) = \frac{1}{2} \left(1 + \mathrm{erf}\left(x / \sqrt{2}\right)\right)

    Parameters
    ----------
    x
        Array of any shape.
    approximate
        "none", or "tanh": x (1 + tanh u) / 2 with u = √(2/π) (x + 0.044715 x³).

    Returns
    -------
    array
        Of the shape and floating dtype of `x`.

    Raises
    ------
    ValueError
        For another `approximate`.

    Notes
    -----
    Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016. Φ(x) = erfc(−x / √2) / 2, which stays exact far left, where
    1 + erf(x / √2) would cancel; and (1 + tanh u) / 2 is σ(2u), for the same reason. As in PyTorch, the result for −∞ is NaN.

    Examples
    --------
    >>> import numpy as np, xpnn
    >>> np.round(xpnn.gelu([-1000.0, 1.0, 100.0]), 4)
    array([ -0.    ,   0.8413, 100.    ])
    >>> np.round(xpnn.gelu([-1000.0, 1.0, 100.0], approximate="tanh"), 4)
    array([  0.    ,   0.8412, 100.    ])
    """
    if approximate == "tanh":
        return times_sigmoid(xp, x, exp_minus_twice_u(xp, xp.abs(x)))
    return 0.5 * x * xp.erfc(-math.sqrt(0.5) * x)


def exp_minus_twice_u(xp, a):
    """exp(−2u) of gelu's approximation, with 2u = p(a) = f a + c a³.

    It is off by as much as p(a) is, so p(a) is the sum of a number that is not rounded at all in float32 and a small one. With
    h, a to a sixteenth at most, they are H = h (F + C h²), where F and C are f and c to a few digits, and
    R = (a − h) (f + c (a (a + h) + h²)) + h (f − F + (c − C) h²). What rounding H + R loses is given to the exponential. Beyond
    32 that is 0, in float64 too, and a may stop.
    """
    a = xp.where(a > 32.0, 32.0, a)
    h = xp.floor(8.0 * a + 0.5) / 8.0
    square = h * h
    large = h * (SHORT_FACTOR + SHORT_CUBIC * square)
    small = h * ((FACTOR - SHORT_FACTOR) + (CUBIC - SHORT_CUBIC) * square)
    small = (a - h) * (FACTOR + CUBIC * (a * (a + h) + square)) + small
    p = large + small
    e = xp.exp(-xp.abs(p))  # there is a quicker and better one of what cannot be above 0
    return e - e * ((large - p) + small)


FACTOR = 2.0 * math.sqrt(2.0 / math.pi)
CUBIC = 0.044715 * FACTOR
SHORT_FACTOR = round(FACTOR * 2**13) / 2**13
SHORT_CUBIC = round(CUBIC * 2**7) / 2**7


@gelu.backward
def gelu_backward(xp, dy, x, *, approximate="none"):
    """g′ = Φ(x) + x φ(x) with the normal density φ(x) = exp(−x²/2) / √(2π) = exp(−x²/2 − log √(2π)).

    With v = 2u, that of x σ(v) is σ(v) + x σ(v) · v′ σ(−v), multiplied in this order, in which nothing overflows.
    """
    if approximate == "tanh":
        s, c = both_sides(xp, x, exp_minus_twice_u(xp, xp.abs(x)))
        square = x * x
        slope = FACTOR + 3.0 * CUBIC * xp.where(square > 1e6, 1e6, square)
        return dy * (s + x * s * (slope * c))
    return dy * (0.5 * xp.erfc(-math.sqrt(0.5) * x) + x * xp.exp(-0.5 * x * x - math.log(math.sqrt(2.0 * math.pi))))


@kernel
def swiglu(xp, gate, up):
    """silu(gate) ⊙ up, the gated unit of Llama's feed-forward layers.

    Parameters
    ----------
    gate
        Array of any shape.
    up
        Another; they are broadcast. The halves of one array `h` are passed as views, `h[..., :n]` and `h[..., n:]`, which
        copies nothing.

    Returns
    -------
    array
        Of their common shape and floating dtype.

    Notes
    -----
    Shazeer, "GLU Variants Improve Transformer", 2020.

    Examples
    --------
    >>> import numpy as np, xpnn
    >>> h = np.array([[0.0, 1.0, 5.0, 2.0]])
    >>> np.round(xpnn.swiglu(h[..., :2], h[..., 2:]), 4)
    array([[0.    , 1.4621]])
    """
    return silu.forward_formula(xp, gate) * up


@swiglu.backward
def swiglu_backward(xp, dy, gate, up):
    """dgate = dy ⊙ up ⊙ silu′(gate), and dup = dy ⊙ silu(gate)."""
    return silu.backward_formula(xp, dy=dy * up, x=gate), dy * silu.forward_formula(xp, gate)


@kernel(check=check_approximate("geglu"), variants=({}, {"approximate": "tanh"}))
def geglu(xp, gate, up, *, approximate="none"):
    """gelu(gate) ⊙ up.

    Parameters
    ----------
    gate
        Array of any shape.
    up
        Another; they are broadcast. The halves of one array `h` are passed as views, `h[..., :n]` and `h[..., n:]`, which
        copies nothing.
    approximate
        "none" or "tanh", as `gelu` takes it.

    Returns
    -------
    array
        Of their common shape and floating dtype.

    Raises
    ------
    ValueError
        For another `approximate`.

    Notes
    -----
    Shazeer, "GLU Variants Improve Transformer", 2020.

    Examples
    --------
    >>> import numpy as np, xpnn
    >>> np.round(xpnn.geglu(np.array([0.0, 1.0]), np.array([5.0, 2.0])), 4)
    array([0.    , 1.6827])
    """
    return gelu.forward_formula(xp, gate, approximate=approximate) * up


@geglu.backward
def geglu_backward(xp, dy, gate, up, *, approximate="none"):
    """dgate = dy ⊙ up ⊙ gelu′(gate), and dup = dy ⊙ gelu(gate)."""
    dgate = gelu.backward_formula(xp, dy=dy * up, x=gate, approximate=approximate)
    return dgate, dy * gelu.forward_formula(xp, gate, approximate=approximate)


@Halves
@kernel
def glu(xp, a, b):
    """a ⊙ σ(b), a and b being the halves of x along an axis; σ is the logistic function.

    Parameters
    ----------
    x
        Array of at least one dimension, of an even number of elements along the axis.
    axis
        The axis that is halved; the last by default.

    Returns
    -------
    array
        Of the floating dtype of `x`, and half as long along the axis.

    Raises
    ------
    ValueError
        Where the number of elements is odd.

    Notes
    -----
    Dauphin et al., "Language Modeling with Gated Convolutional Networks", 2017; arguments as in
    `torch.nn.functional.glu`. The halves are not copied. Not a kernel but `xpnn.backends.halves.Halves`, it has a kernel's
    call, `vjp`, `backward` (given `x`), `explain`, `source` and `warmup`; but no `wrt`, and its result is never one number, so
    `value_and_grad` raises.

    Examples
    --------
    >>> import xpnn
    >>> xpnn.glu([3.0, 5.0, 0.0, 1000.0])
    array([1.5, 5. ])
    """
    return a * sigmoid.forward_formula(xp, b)


@glu.kernel.backward
def glu_backward(xp, dy, a, b):
    """da = dy ⊙ σ(b), and db = dy ⊙ a ⊙ σ(b) σ(−b)."""
    s, c = both_sides(xp, b, xp.exp(-xp.abs(b)))
    return dy * s, dy * (a * (s * c))
