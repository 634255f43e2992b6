"""A perceptron of L layers, forward with its caches and backward, composed from this library's kernels.

With m examples, layer l has n₀ inputs and n₂ outputs; A is m×n₀, W is n₂×n₀ and b is n₂:

    forward     Z = A Wᵀ + b,  A⁽ˡ⁾ = g(Z)
    backward    dZ = dA ⊙ g′(Z),  dW = dZᵀ A⁽ˡ⁻¹⁾,  db = Σ dZ over the examples,  dA⁽ˡ⁻¹⁾ = dZ W

`xpnn.linear` holds both lines. The last layer has no activation: its result, the logits, goes to `xpnn.cross_entropy`.
"""

import itertools

import numpy as np

import xpnn


def xavier(sizes, rng, dtype="float32"):
    """Xavier's weights and biases of zero, a pair for each layer.

    That keeps activations and gradients about as large in the last layer as in the first, so that no unit starts out
    saturated and few ReLUs start out dead.

    Parameters
    ----------
    sizes
        The number of inputs, of units in each hidden layer, and of classes.
    rng
        A `numpy.random.Generator`.
    """
    return [
        (xpnn.init.xavier_uniform((n2, n0), rng=rng, dtype=dtype), np.zeros(n2, dtype)) for n0, n2 in itertools.pairwise(sizes)
    ]


def forward(params, x, activation=xpnn.relu):
    """The logits of a batch, and for each layer what its backward needs."""
    caches = []
    a = x
    for number, (weight, bias) in enumerate(params, 1):
        g = activation if number < len(params) else None
        a, cache = xpnn.linear.vjp(a, weight, bias, activation=g)
        caches.append(cache)
    return a, caches


def backward(dlogits, caches):
    """(dW, db) for each layer, from the gradient by the logits."""
    gradients = []
    da = dlogits
    for cache in reversed(caches):
        da, dweight, dbias = cache(da)
        gradients.append((dweight, dbias))
    return gradients[::-1]


def loss_and_gradients(params, x, target, activation=xpnn.relu):
    """The mean cross-entropy of a batch, and its gradient by every weight and bias."""
    logits, caches = forward(params, x, activation)
    loss, dlogits = xpnn.cross_entropy.value_and_grad(logits, target)
    return loss, backward(dlogits, caches)


def main():
    """Print a forward and a backward pass of a small network, and one slope measured instead of derived."""
    rng = np.random.default_rng(0)
    params = xavier((4, 8, 8, 3), rng, "float64")
    x, target = rng.standard_normal((5, 4)), rng.integers(0, 3, 5)
    loss, gradients = loss_and_gradients(params, x, target, xpnn.tanh)
    print(f"loss {loss:.6f}")
    for number, (dweight, dbias) in enumerate(gradients, 1):
        print(f"layer {number}: |dW| {np.linalg.norm(dweight):.6f}  |db| {np.linalg.norm(dbias):.6f}")
    weight, step = params[0][0], 1e-6
    weight[0, 0] += step
    above, _ = loss_and_gradients(params, x, target, xpnn.tanh)
    weight[0, 0] -= 2 * step
    below, _ = loss_and_gradients(params, x, target, xpnn.tanh)
    print(f"dW[0, 0] of layer 1: {gradients[0][0][0, 0]:.9f} derived, {(above - below) / (2 * step):.9f} measured")


if __name__ == "__main__":
    main()
