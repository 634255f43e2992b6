"""The activations of the notes' table, with their derivatives."""

from xpnn.backends.kernel import kernel


@kernel
def sigmoid(xp, x):
    r"""The logistic function, in (0, 1).

    .. math:: g(x) = \frac{1}{1 + e^{-x}}

    Written with e = exp(−|x|), which never overflows, and q = e / (1 + e), which is g(−|x|): above zero g is 1 − q; below,
    where it is q, e − e q is the same number with half the rounding.

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
    >>> xpnn.sigmoid([-1000.0, 0.0, 1000.0])
    array([0. , 0.5, 1. ])
    """
    e = xp.exp(-xp.abs(x))
    q = e / (1.0 + e)
    return xp.where(x >= 0, 1.0 - q, e - e * q)


@sigmoid.backward
def sigmoid_backward(xp, dy, y):
    """g′ = g (1 − g), at most 1/4: ten saturated layers shrink a gradient a million times."""
    return dy * (y * (1.0 - y))


@kernel
def tanh(xp, x):
    r"""The hyperbolic tangent, zero-centred, in (−1, 1).

    .. math:: g(x) = \frac{e^{x} - e^{-x}}{e^{x} + e^{-x}}

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
    >>> xpnn.tanh([-1000.0, 0.0, 1000.0])
    array([-1.,  0.,  1.])
    """
    return xp.tanh(x)


@tanh.backward
def tanh_backward(xp, dy, y):
    """g′ = 1 − g², written (1 − g)(1 + g): exact where 1 − g² would cancel near |g| = 1."""
    return dy * ((1.0 - y) * (1.0 + y))


@kernel
def relu(xp, x):
    r"""The rectifier; NaN stays NaN.

    .. math:: g(x) = \max(0, x)

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
    >>> xpnn.relu([-1.0, 0.0, 2.0])
    array([0., 0., 2.])
    """
    return xp.where(x <= 0, 0.0, x)


@relu.backward
def relu_backward(xp, dy, y):
    """g′ = 1·(x > 0), with g′(0) = 0, PyTorch's choice of sub-gradient.

    The notes print 1·(x > 0)·x, which is a slip: the slope of x ↦ x is 1. The output serves as the cache, since y > 0
    exactly where x > 0.
    """
    return xp.where(y <= 0, 0.0, dy)
