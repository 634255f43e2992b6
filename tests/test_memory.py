"""The fused pass allocates its results and nothing of the logits' size besides."""

import tracemalloc
from collections.abc import Callable

import numpy as np

import xpnn

LOGITS = np.random.default_rng(0).standard_normal((512, 4096)).astype("f4")
TARGET = np.random.default_rng(1).integers(0, 4096, 512)


def peak(function: Callable[[], object]) -> int:
    """The most memory, in bytes, that NumPy holds at once during a call, what it returns included."""
    function()
    tracemalloc.start()
    try:
        kept = function()
        return tracemalloc.get_traced_memory()[1] if kept is not None else 0
    finally:
        tracemalloc.stop()


def test_cross_entropy() -> None:
    """A given buffer: nothing; otherwise one gradient. The composed formula takes several (so the measure can fail)."""
    size = LOGITS.nbytes
    out = np.empty_like(LOGITS)
    with xpnn.use_backend("numba"):
        assert peak(lambda: xpnn.cross_entropy.value_and_grad(LOGITS, TARGET, out=out)) < 0.01 * size
        assert peak(lambda: xpnn.cross_entropy.value_and_grad(LOGITS, TARGET)) < 1.01 * size
        assert peak(lambda: xpnn.cross_entropy(LOGITS, TARGET)) < 0.01 * size
    with xpnn.use_backend("numpy"):
        assert peak(lambda: xpnn.cross_entropy.value_and_grad(LOGITS, TARGET)) > 1.5 * size


def test_softmax_and_linear() -> None:
    """One result each; linear's activation runs over the product in place."""
    size = LOGITS.nbytes
    x, weight = LOGITS[:, :64].copy(), np.ones((4096, 64), "f4")
    with xpnn.use_backend("numba"):
        assert peak(lambda: xpnn.softmax(LOGITS)) < 1.01 * size
        assert peak(lambda: xpnn.linear(x, weight, np.ones(4096, "f4"), activation=xpnn.relu)) < 1.1 * size


def test_pullback_keeps_only_what_backward_reads() -> None:
    """softmax's pullback keeps its output, not its input."""
    x = LOGITS.copy()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        y, pullback = xpnn.softmax.vjp(LOGITS.copy())
        assert tracemalloc.get_traced_memory()[0] - before < 1.1 * x.nbytes
        assert pullback(y).shape == x.shape
    finally:
        tracemalloc.stop()
