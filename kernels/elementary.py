"""The logarithm, as the notes build cross-entropy up: x → log x → yᵀ log x."""

from xpnn.backends.kernel import kernel


@kernel(domain={"x": "positive"})
def log(xp, x):
    """The natural logarithm; −inf at 0, NaN below.

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
    >>> xpnn.log([0.0, 1.0])
    array([-inf,   0.])
    """
    return xp.log(x)


@log.backward
def log_backward(xp, dy, x):
    """The Jacobian is diag(1 / x), so dx = dy / x."""
    return dy / x
