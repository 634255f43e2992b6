"""The linear layer, with bias, activation and their gradients fused around the matrix products."""

from xpnn.backends.kernel import Kernel, kernel
from xpnn.backends.kinds import Column, Matrix
from xpnn.kernels.activations import relu, sigmoid
from xpnn.kernels.gates import gelu


def check_activation(kinds, shapes, options):
    """An activation must be a kernel of one array, without an axis."""
    activation = options["activation"]
    if activation is None:
        return
    fits = isinstance(activation, Kernel) and not activation.has_axis
    d = activation.declaration if fits else None
    if d is None or len(d.inputs) != 1 or len(d.outputs) != 1 or d.saved:
        raise TypeError(f"linear: activation: got {activation!r}, expected an element-wise kernel such as xpnn.relu, or None")


@kernel(
    check=check_activation, saved=("z",), variants=({}, {"activation": relu}, {"activation": sigmoid}, {"activation": gelu})
)
def linear(xp, x, weight: Matrix, bias: Column = None, *, activation=None):
    """Z = A Wᵀ + b for a batch, z = W a + b for one example, and g(Z) where an activation g is named.

    Parameters
    ----------
    x
        A, of shape (..., n₀): any number of leading dimensions, none for one example.
    weight
        W, of shape (n₂, n₀).
    bias
        b, of shape (n₂,), or None.
    activation
        An element-wise kernel such as `xpnn.relu`, or None.

    Returns
    -------
    array
        Of shape (..., n₂).

    Notes
    -----
    The product is left to the library's BLAS; bias and activation run over its result in one pass, in place. Backward
    first makes dZ and its column sums in one pass, then the two products. `torch.nn.functional.linear` has the same
    arguments but the activation.

    Examples
    --------
    >>> import numpy as np, xpnn
    >>> xpnn.linear(np.array([1.0, 2.0]), np.array([[1.0, 1.0], [0.0, -1.0]]), activation=xpnn.relu)
    array([3., 0.])
    """
    z = xp.matmul(x, weight.T)
    if bias is not None:
        z = z + bias
    return (z if activation is None else activation.forward_formula(xp, z)), z


@linear.backward
def linear_backward(xp, dy, x, weight, bias, y, z, *, activation=None):
    """dZ = dA ⊙ g′(Z), then dA⁽ˡ⁻¹⁾ = dZ W, dW = dZᵀ A⁽ˡ⁻¹⁾ and db = Σ dZ over the examples.

    For one example, dW = dZᵀ A is the outer product dz ⊗ a, and dZ W is Wᵀ dz.
    """
    dz = dy if activation is None else activation.backward_formula(xp, dy=dy, x=z, y=y)
    db = None if bias is None else xp.sum(dz, axis=0, keepdims=True)
    return xp.matmul(dz, weight), xp.matmul(dz.T, x), db
