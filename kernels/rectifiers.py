"""Activations in pieces: straight lines, or a line and an exponential."""

from xpnn.backends.kernel import kernel
from xpnn.kernels.activations import sigmoid

# where selu keeps mean 0 and variance 1: Klambauer et al., "Self-Normalizing Neural Networks", 2017
SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946


def clipped(xp, x, least, most):
    """x, but no less than `least` and no more than `most`; NaN stays NaN."""
    return xp.where(x < least, least, xp.where(x > most, most, x))


@kernel(variants=({}, {"negative_slope": -0.3}))
def leaky_relu(xp, x, *, negative_slope=0.01):
    r"""x above 0, and a small part of it below, so that no unit is ever dead.

    .. math:: g(x) = \max(0, x) + s \, \min(0, x)

    Parameters
    ----------
    x
        Array of any shape.
    negative_slope
        The slope below 0; it may be negative.

    Returns
    -------
    array
        Of the shape and floating dtype of `x`.

    Examples
    --------
    >>> import xpnn
    >>> xpnn.leaky_relu([-1.0, 0.0, 2.0], negative_slope=0.1)
    array([-0.1,  0. ,  2. ])
    """
    return xp.where(x > 0, x, negative_slope * x)


@leaky_relu.backward
def leaky_relu_backward(xp, dy, x, *, negative_slope=0.01):
    """g′ is 1 above 0 and the slope elsewhere, at 0 too, as in PyTorch.

    A negative slope makes two inputs of one output, so the input is the cache.
    """
    return xp.where(x > 0, dy, negative_slope * dy)


@kernel(variants=({"alpha": 1.7}, {"alpha": -0.6}))
def elu(xp, x, *, alpha=1.0):
    r"""x above 0, and α (eˣ − 1) below, which levels off at −α.

    .. math:: g(x) = \max(0, x) + \min(0, \alpha \, (e^{x} - 1))

    Parameters
    ----------
    x
        Array of any shape.
    alpha
        α.

    Returns
    -------
    array
        Of the shape and floating dtype of `x`.

    Notes
    -----
    Clevert et al., "Fast and Accurate Deep Network Learning by Exponential Linear Units", 2016. eˣ − 1 is `expm1`, which does
    not cancel near 0.

    Examples
    --------
    >>> import xpnn
    >>> xpnn.elu([-1000.0, 0.0, 2.0])
    array([-1.,  0.,  2.])
    """
    return xp.where(x < 0, alpha * xp.expm1(x), x)


@elu.backward
def elu_backward(xp, dy, x, *, alpha=1.0):
    """g′ is 1 above 0, and α eˣ elsewhere: α at 0, as in PyTorch. Only −|x| is exponentiated, which cannot overflow."""
    return xp.where(x > 0, dy, alpha * xp.exp(-xp.abs(x)) * dy)


@kernel
def selu(xp, x):
    r"""λ x above 0, and λ α (eˣ − 1) below, with α and λ such that a layer's outputs keep mean 0 and variance 1.

    .. math:: g(x) = \lambda \, (\max(0, x) + \min(0, \alpha \, (e^{x} - 1)))

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
    Klambauer et al., "Self-Normalizing Neural Networks", 2017; λ = 1.0507, α = 1.6733.

    Examples
    --------
    >>> import numpy as np, xpnn
    >>> np.round(xpnn.selu([-1000.0, 0.0, 1.0]), 4)
    array([-1.7581,  0.    ,  1.0507])
    """
    return xp.where(x < 0, SELU_ALPHA * SELU_SCALE * xp.expm1(x), SELU_SCALE * x)


@selu.backward
def selu_backward(xp, dy, x):
    """λ times that of `elu`: λ α at 0."""
    return xp.where(x > 0, SELU_SCALE * dy, SELU_ALPHA * SELU_SCALE * xp.exp(-xp.abs(x)) * dy)


def check_celu(kinds, shapes, options):
    """x / α needs an α that is not zero."""
    if options["alpha"] == 0:
        raise ValueError(f"celu: alpha: got {options['alpha']!r}, expected a number other than 0")


@kernel(check=check_celu, variants=({"alpha": 2.0}, {"alpha": -4.0}))
def celu(xp, x, *, alpha=1.0):
    r"""x above 0, and α (exp(x / α) − 1) below: an `elu` whose slope is 1 on both sides of 0 for every α.

    .. math:: g(x) = \max(0, x) + \min(0, \alpha \, (e^{x / \alpha} - 1))

    Parameters
    ----------
    x
        Array of any shape.
    alpha
        α, not 0.

    Returns
    -------
    array
        Of the shape and floating dtype of `x`.

    Raises
    ------
    ValueError
        Where `alpha` is 0.

    Notes
    -----
    Barron, "Continuously Differentiable Exponential Linear Units", 2017.

    Examples
    --------
    >>> import xpnn
    >>> xpnn.celu([-1000.0, 0.0, 2.0], alpha=3.0)
    array([-3.,  0.,  2.])
    """
    return xp.where(x < 0, alpha * xp.expm1(x / alpha), x)


@celu.backward
def celu_backward(xp, dy, x, *, alpha=1.0):
    """g′ is 1 above 0, and exp(x / α) elsewhere."""
    return xp.where(x > 0, dy, xp.exp(x / alpha) * dy)


@kernel(variants=({"beta": 2.0, "threshold": 5.0}, {"beta": 0.7}))
def softplus(xp, x, *, beta=1.0, threshold=20.0):
    r"""log(1 + exp(β x)) / β, a relu with its corner rounded off; x itself where β x is above a threshold.

    .. math:: g(x) = \frac{1}{\beta} \, \log(1 + e^{\beta x})

    Parameters
    ----------
    x
        Array of any shape.
    beta
        β: the larger, the sharper the corner.
    threshold
        From where on β x is taken to be large; at 20 what is left out is 2e-9.

    Returns
    -------
    array
        Of the shape and floating dtype of `x`.

    Notes
    -----
    With v = β x it is (max(0, v) + log(1 + exp(−|v|))) / β, in which nothing overflows or cancels, whatever the threshold.

    Examples
    --------
    >>> import numpy as np, xpnn
    >>> np.round(xpnn.softplus([-1000.0, 0.0, 100.0]), 4)
    array([  0.    ,   0.6931, 100.    ])
    """
    v = beta * x
    return xp.where(v > threshold, x, (xp.where(v < 0, 0.0, v) + xp.log1p(xp.exp(-xp.abs(v)))) / beta)


@softplus.backward
def softplus_backward(xp, dy, x, *, beta=1.0, threshold=20.0):
    """g′ is the sigmoid of β x, and 1 above the threshold."""
    v = beta * x
    return xp.where(v > threshold, dy, dy * sigmoid.forward_formula(xp, v))


def check_hardtanh(kinds, shapes, options):
    """The bounds must be in order."""
    least, most = options["min_val"], options["max_val"]
    if not least <= most:
        raise ValueError(f"hardtanh: min_val: got {least!r}, expected at most max_val, which is {most!r}")


@kernel(check=check_hardtanh, variants=({}, {"min_val": -0.5, "max_val": 2.0}))
def hardtanh(xp, x, *, min_val=-1.0, max_val=1.0):
    r"""x, cut off at two bounds; NaN stays NaN.

    .. math:: g(x) = \min(\max(x, a), b)

    Parameters
    ----------
    x
        Array of any shape.
    min_val, max_val
        The bounds.

    Returns
    -------
    array
        Of the shape and floating dtype of `x`.

    Raises
    ------
    ValueError
        Where `min_val` is above `max_val`.

    Examples
    --------
    >>> import xpnn
    >>> xpnn.hardtanh([-3.0, 0.5, 3.0])
    array([-1. ,  0.5,  1. ])
    """
    return clipped(xp, x, min_val, max_val)


@hardtanh.backward
def hardtanh_backward(xp, dy, x, *, min_val=-1.0, max_val=1.0):
    """g′ is 1 between the bounds, and 0 at them, as in PyTorch.

    An output in half precision may lie on the other side of a bound, so the input is the cache.
    """
    return xp.where((x <= min_val) | (x >= max_val), 0.0, dy)


@kernel
def relu6(xp, x):
    r"""min(max(0, x), 6), a `relu` that fits few bits; NaN stays NaN.

    .. math:: g(x) = \min(\max(0, x), 6)

    Parameters
    ----------
    x
        Array of any shape.

    Returns
    -------
    array
        Of the shape and floating dtype of `x`.

    Examples
    --------
    >>> import xpnn
    >>> xpnn.relu6([-1.0, 2.0, 7.0])
    array([0., 2., 6.])
    """
    return clipped(xp, x, 0.0, 6.0)


@relu6.backward
def relu6_backward(xp, dy, y):
    """g′ is 1 between 0 and 6, and 0 at them; the output lies between them where the input does."""
    return xp.where((y <= 0) | (y >= 6), 0.0, dy)


@kernel
def hardsigmoid(xp, x):
    r"""x / 6 + 1/2 between 0 and 1, a `sigmoid` of three straight lines.

    .. math:: g(x) = \min(\max(0, \frac{x}{6} + \frac{1}{2}), 1)

    Parameters
    ----------
    x
        Array of any shape.

    Returns
    -------
    array
        Of the shape and floating dtype of `x`.

    Examples
    --------
    >>> import xpnn
    >>> xpnn.hardsigmoid([-4.0, 0.0, 4.0])
    array([0. , 0.5, 1. ])
    """
    # a sum that is exact near −3, where the result is small, and one that rounds less beyond
    return clipped(xp, xp.where(x < -1.5, (x + 3.0) * (1.0 / 6.0), x * (1.0 / 6.0) + 0.5), 0.0, 1.0)


@hardsigmoid.backward
def hardsigmoid_backward(xp, dy, x):
    """g′ is 1/6 between −3 and 3, and 0 at them, as in PyTorch. Near 3 the output may be rounded to 1, so x is the cache."""
    return xp.where((x > -3) & (x < 3), dy / 6.0, 0.0)


@kernel
def hardswish(xp, x):
    r"""x times `hardsigmoid`, a `silu` without an exponential.

    .. math:: g(x) = x \, \min(\max(0, \frac{x}{6} + \frac{1}{2}), 1)

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
    Howard et al., "Searching for MobileNetV3", 2019. As in PyTorch, the result for −∞ is NaN.

    Examples
    --------
    >>> import xpnn
    >>> xpnn.hardswish([-4.0, -1.5, 4.0])
    array([-0.   , -0.375,  4.   ])
    """
    return x * hardsigmoid.forward_formula(xp, x)


@hardswish.backward
def hardswish_backward(xp, dy, x):
    """g′ is 0 up to −3, x / 3 + 1/2 up to 3, and 1 from there on; (2x + 3) / 6 rounds once fewer."""
    return xp.where(x <= -3, 0.0, xp.where(x >= 3, dy, dy * ((2.0 * x + 3.0) / 6.0)))
