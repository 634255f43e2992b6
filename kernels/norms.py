"""Normalisation of rows, as a transformer's layers do it."""

from numbers import Real

from xpnn.backends.kernel import kernel
from xpnn.backends.kinds import Column


@kernel(saved=("mean", "rstd"), span="normalized_shape", wide=("weight", "bias"))
def layer_norm(xp, x, weight: Column = None, bias: Column = None, *, eps=1e-5):
    """yⱼ = wⱼ (xⱼ − μ) / √(σ² + ε) + bⱼ: each row brought to mean 0 and variance 1, then scaled and shifted.

    μ and σ² are the row's mean and its variance, divided by the number of its elements, not one less.

    Parameters
    ----------
    x
        Array of at least one dimension.
    normalized_shape
        The shape of the last axes, which make up a row: an integer or a tuple; the last axis by default.
    weight
        w, of shape `normalized_shape`, or None.
    bias
        b, of shape `normalized_shape`, or None.
    eps
        ε, a number added to the variance. As in PyTorch any is taken: of a sum below 0 the result is NaN.

    Returns
    -------
    array
        Of the shape and floating dtype of `x`.

    Raises
    ------
    TypeError
        Where `eps` is not a number.
    ValueError
        Where `x` has no dimensions.

    Notes
    -----
    Ba, Kiros, Hinton, "Layer normalization", arXiv:1607.06450; arguments as in `torch.nn.functional.layer_norm`. The mean is
    computed twice: with a for what comes out first, rounded, μ is a + mean(x − a), so that a constant row comes out as 0; and
    σ² is mean((x − a)²) − (μ − a)², where mean(x²) − μ² would cancel for large |μ|. The saved values are μ and 1 / √(σ² + ε).

    Examples
    --------
    >>> import numpy as np, xpnn
    >>> xpnn.layer_norm(np.array([[1.0, 3.0], [5.0, 5.0]]), 2, eps=0.0, bias=np.array([0.0, 10.0]))
    array([[-1., 11.],
           [nan, nan]])
    """
    near = xp.mean(x, axis=-1, keepdims=True)
    left = x - near
    rest = xp.mean(left, axis=-1, keepdims=True)
    mean = near + rest
    rstd = 1.0 / xp.sqrt(xp.mean(left * left, axis=-1, keepdims=True) - rest * rest + eps)
    return scaled((x - mean) * rstd, weight, bias), mean, rstd


@layer_norm.backward
def layer_norm_backward(xp, dy, x, weight, bias, mean, rstd):
    """With x̂ = (x − μ) r and g = w ⊙ dy: dx = r (g − mean(g) − x̂ mean(g ⊙ x̂)), dw = Σ dy ⊙ x̂ and db = Σ dy over the rows.

    x̂ does not change when a row is shifted or stretched, so dx has no part along 1 nor along x̂: these are taken out of g.
    """
    normal = (x - mean) * rstd
    g = scaled(dy, weight)
    along = xp.mean(g * normal, axis=-1, keepdims=True)
    dx = rstd * ((g - xp.mean(g, axis=-1, keepdims=True)) - normal * along)
    dweight = None if weight is None else xp.sum(dy * normal, axis=0, keepdims=True)
    return dx, dweight, None if bias is None else xp.sum(dy, axis=0, keepdims=True)


def check_eps(kinds, shapes, options):
    """None, or a number."""
    eps = options["eps"]
    if eps is None:
        return
    if isinstance(eps, bool) or not isinstance(eps, Real):
        raise TypeError(f"rms_norm: eps: got {eps!r}, expected a number or None")
    options["eps"] = float(eps)


@kernel(saved=("scale",), span="normalized_shape", wide=("weight",), check=check_eps, variants=({"eps": 1e-3},))
def rms_norm(xp, x, weight: Column = None, *, eps=None):
    """yⱼ = wⱼ xⱼ / √(mean x² + ε): each row brought to a mean square of 1, then scaled.

    Parameters
    ----------
    x
        Array of at least one dimension.
    normalized_shape
        The shape of the last axes, which make up a row: an integer or a tuple; the last axis by default.
    weight
        w, of shape `normalized_shape`, or None.
    eps
        ε, a number added to the mean square; any, as in `layer_norm`. None is the distance from 1 to the next number of the
        dtype that is computed with: 2⁻²³ for half precision too.

    Returns
    -------
    array
        Of the shape and floating dtype of `x`.

    Raises
    ------
    TypeError
        Where `eps` is neither None nor a number.
    ValueError
        Where `x` has no dimensions.

    Notes
    -----
    Zhang, Sennrich, "Root mean square layer normalization", arXiv:1910.07467; arguments as in
    `torch.nn.functional.rms_norm`. The saved value is 1 / √(mean x² + ε).

    Examples
    --------
    >>> import numpy as np, xpnn
    >>> np.round(xpnn.rms_norm(np.array([[1.0, 7.0]]), weight=np.array([5.0, 10.0])), 6)
    array([[ 1., 14.]])
    """
    eps = xp.finfo(x.dtype).eps if eps is None else eps
    scale = 1.0 / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + eps)
    return scaled(x * scale, weight), scale


@rms_norm.backward
def rms_norm_backward(xp, dy, x, weight, scale):
    """With x̂ = s x and g = w ⊙ dy: dx = s (g − x̂ mean(g ⊙ x̂)) and dw = Σ dy ⊙ x̂ over the rows."""
    normal = x * scale
    g = scaled(dy, weight)
    dx = scale * (g - normal * xp.mean(g * normal, axis=-1, keepdims=True))
    return dx, None if weight is None else xp.sum(dy * normal, axis=0, keepdims=True)


def scaled(x, weight, bias=None):
    """x times the weights plus the biases, as far as there are any."""
    y = x if weight is None else x * weight
    return y if bias is None else y + bias
