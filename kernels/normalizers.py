"""softmax and its kin, along the row; all are shifted by the row's maximum, so that exp never overflows."""

from array_api_compat import device

from xpnn.backends.arrays import namespace
from xpnn.backends.kernel import kernel


def exp_minus_max(xp, x, m=None):
    """m = max x along the row, and exp(x − m): the one place where a row is shifted so that exp never overflows.

    A maximum that was saved may be given.
    """
    if m is None:
        m = xp.max(x, axis=-1, keepdims=True)
    return m, xp.exp(x - m)


@kernel
def softmax(xp, x):
    """yᵢ = exp(xᵢ) / Σⱼ exp(xⱼ), along an axis.

    Parameters
    ----------
    x
        Array of at least one dimension.
    axis
        The axis that sums to one; the last by default.

    Returns
    -------
    array
        Of the shape and floating dtype of `x`.

    Notes
    -----
    Multiplying numerator and denominator by exp(−max x) changes nothing and keeps every exponent at or below zero. A row
    of −inf, or with +inf, gives NaN; entries of −inf beside finite ones give exact zeros.

    Examples
    --------
    >>> import xpnn
    >>> xpnn.softmax([1000.0, 1000.0])
    array([0.5, 0.5])
    """
    _, e = exp_minus_max(xp, x)
    return e / xp.sum(e, axis=-1, keepdims=True)


@softmax.backward
def softmax_backward(xp, dy, y):
    """∂yᵢ/∂xⱼ = yᵢ(δᵢⱼ − yⱼ), so dx = y ⊙ (dy − Σⱼ dyⱼ yⱼ)."""
    return y * (dy - xp.sum(dy * y, axis=-1, keepdims=True))


@kernel
def log_softmax(xp, x):
    """yᵢ = xᵢ − log Σⱼ exp(xⱼ), along an axis.

    Parameters
    ----------
    x
        Array of at least one dimension.
    axis
        The axis whose exponentials sum to one; the last by default.

    Returns
    -------
    array
        Of the shape and floating dtype of `x`.

    Notes
    -----
    (x − m) − log s, never x − (m + log s): with logits near 1e4 the sum m + log s would round log s away.

    Examples
    --------
    >>> import xpnn
    >>> xpnn.log_softmax([0.0, -1000.0])
    array([    0., -1000.])
    """
    m, e = exp_minus_max(xp, x)
    return (x - m) - xp.log(xp.sum(e, axis=-1, keepdims=True))


@log_softmax.backward
def log_softmax_backward(xp, dy, y):
    """∂yᵢ/∂xⱼ = δᵢⱼ − softmax(x)ⱼ, so dx = dy − exp(y) Σⱼ dyⱼ."""
    return dy - xp.exp(y) * xp.sum(dy, axis=-1, keepdims=True)


@kernel(saved=("m", "s"))
def logsumexp(xp, x):
    """log Σⱼ exp(xⱼ), along an axis, which the result has no more.

    Parameters
    ----------
    x
        Array of at least one dimension.
    axis
        The axis that is summed over; the last by default.

    Returns
    -------
    array
        Of the floating dtype of `x` and its shape without the axis. A row of −inf gives −inf, one with +inf gives +inf.

    Examples
    --------
    >>> import numpy as np, xpnn
    >>> xpnn.logsumexp([0.0, 0.0]) == np.log(2)
    np.True_
    """
    m, e = exp_minus_max(xp, x)
    s = xp.sum(e, axis=-1, keepdims=True)
    return xp.where(xp.abs(m) == xp.inf, m, m + xp.log(s)), m, s  # inf − inf made s NaN


@logsumexp.backward
def logsumexp_backward(xp, dy, x, m, s):
    """∂y/∂xⱼ = exp(xⱼ) / Σ exp(x) = softmax(x)ⱼ."""
    _, e = exp_minus_max(xp, x, m)
    return dy * (e / s)


def softmax_jacobian(x, *, axis=-1):
    """The Jacobian of softmax, ∂yᵢ/∂xⱼ = yᵢ(δᵢⱼ − yⱼ): n × n for every row of n.

    `softmax.backward` multiplies by it without ever forming it; this returns it, to look at and to test against.

    Parameters
    ----------
    x
        Array of at least one dimension.
    axis
        The axis that softmax runs along.

    Returns
    -------
    array
        The shape of `x` without the axis, then (n, n): i, j at the end.

    Examples
    --------
    >>> import xpnn
    >>> xpnn.softmax_jacobian([0.0, 0.0])
    array([[ 0.25, -0.25],
           [-0.25,  0.25]])
    """
    y = softmax(x, axis=axis)
    xp = namespace(y)
    y = xp.moveaxis(y, axis, -1)
    identity = xp.eye(y.shape[-1], dtype=y.dtype, device=device(y))
    return y[..., :, None] * (identity - y[..., None, :])
