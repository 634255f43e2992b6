"""Would the fused CPU kernels pay inside JAX? They could be called from a compiled function by `jax.pure_callback`.

    python tools/jax_callback.py

Times the composed formula as XLA compiles it beside such a call of the fused kernel, in one run, in turn; medians.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import xpnn
import xpnn.jax

SIZES = ((64, 10), (4096, 1000), (1024, 30522))
ROUNDS = 15


def loss(logits, target):
    return jax.value_and_grad(xpnn.jax.cross_entropy)(logits, target)


def loss_by_callback(logits, target):
    shapes = jax.ShapeDtypeStruct((), logits.dtype), jax.ShapeDtypeStruct(logits.shape, logits.dtype)

    def fused(logits, target):
        return xpnn.cross_entropy.value_and_grad(np.asarray(logits), np.asarray(target))

    return jax.pure_callback(fused, shapes, logits, target)


def softmax(x, _):
    return xpnn.jax.softmax(x)


def softmax_by_callback(x, _):
    return jax.pure_callback(lambda x: xpnn.softmax(np.asarray(x)), jax.ShapeDtypeStruct(x.shape, x.dtype), x)


CASES = {"cross_entropy and gradient": (loss, loss_by_callback), "softmax": (softmax, softmax_by_callback)}


def main():
    rng = np.random.default_rng(0)
    print(f"jax {jax.__version__}, float32, medians of {ROUNDS}: compiled by XLA / called back / called on NumPy arrays, in ms")
    for rows, columns in SIZES:
        x, t = rng.standard_normal((rows, columns), "float32"), rng.integers(0, columns, rows)
        given = jnp.asarray(x), jnp.asarray(t)
        for name, functions in CASES.items():
            compiled = [jax.jit(f) for f in functions]
            plain = xpnn.softmax if name == "softmax" else xpnn.cross_entropy.value_and_grad
            ways = [*((f, given) for f in compiled), (plain, (x,) if name == "softmax" else (x, t))]
            first, second = (jax.block_until_ready(f(*a)) for f, a in ways[:2])
            for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
            times = [[], [], []]
            for _ in range(ROUNDS):
                for k, (f, arguments) in enumerate(ways):
                    started = time.perf_counter()
                    jax.block_until_ready(f(*arguments))
                    times[k].append(1e3 * (time.perf_counter() - started))
            print(f"{name:27} {rows}x{columns:<6}", *(f"{statistics.median(t):9.3f}" for t in times), flush=True)


if __name__ == "__main__":
    main()
