"""Kernels on other libraries' arrays: results of that library, equal to NumPy's, whatever ran before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import xpnn

RNG = np.random.default_rng(9)
X = RNG.normal(size=(4, 6))


def calls(case: Any, arrays: dict[str, Any], make: Callable[[Any], Any] = lambda a: a) -> list[Any]:
    """Forward, pullback and backward; cotangents differ by element."""
    k, options = case.kernel, case.options
    y, pullback = k.vjp(*case.given(arrays), **options)
    dy = make(case.cotangent(np.zeros(tuple(y.shape))))
    results = [k(*case.given(arrays), **options), y]
    for gradients in (pullback(dy), k.backward(dy, **arrays, **options)):
        results += gradients if isinstance(gradients, tuple) else [gradients]
    return results


def test_every_kernel_elsewhere(
    library: Any, case: Any, close: Callable[..., None], numpy_reference: Callable[..., Any]
) -> None:
    """Forward, vjp and backward give arrays of the library, equal to NumPy's in float64."""
    arrays = case.arrays()
    want = numpy_reference(calls, case, arrays)
    got = calls(case, {n: library.array(a) for n, a in arrays.items()}, library.array)
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert (g is None) is (w is None)
        if w is not None:
            close(library.numpy(g), w, dtype=np.float64)


def test_value_and_grad_elsewhere(
    library: Any, case: Any, close: Callable[..., None], numpy_reference: Callable[..., Any]
) -> None:
    """The fused pass of every kernel whose result is one number; the others refuse."""
    arrays = case.arrays()
    given = {n: library.array(a) for n, a in arrays.items()}
    if np.shape(numpy_reference(case.kernel, **arrays, **case.options)) != ():
        with pytest.raises(ValueError, match="the result: got more than one number"):
            case.kernel.value_and_grad(**given, **case.options)
        return
    want, gradients = numpy_reference(case.kernel.value_and_grad, **arrays, **case.options)
    value, found = case.kernel.value_and_grad(**given, **case.options)
    close(library.numpy(value), want, dtype=np.float64)
    single = not isinstance(gradients, tuple)
    for g, w in zip((found,) if single else found, (gradients,) if single else gradients, strict=True):
        close(library.numpy(g), w, dtype=np.float64)


def test_float32_stays(library: Any, case: Any, close: Callable[..., None], numpy_reference: Callable[..., Any]) -> None:
    arrays = case.arrays(dtype=np.float32)
    wide = {n: a.astype(np.float64) if a.dtype.kind == "f" else a for n, a in arrays.items()}
    got = case.kernel(*case.given({n: library.array(a) for n, a in arrays.items()}), **case.options)
    close(library.numpy(got), numpy_reference(case.kernel, *case.given(wide), **case.options), dtype=np.float32)


def test_numpy_first(library: Any, close: Callable[..., None]) -> None:
    """The short way for NumPy arrays of the same dtype and dimensions is not taken for another library's."""
    target = RNG.integers(0, 6, 4)
    for _ in range(2):
        want = xpnn.softmax(X)
        loss, g = xpnn.cross_entropy.value_and_grad(X, target)
    for _ in range(2):
        close(library.numpy(xpnn.softmax(library.array(X))), want)
        ours = xpnn.cross_entropy.value_and_grad(library.array(X), library.array(target))
        close(library.numpy(ours[0]), loss)
        close(library.numpy(ours[1]), g)
        np.testing.assert_array_equal(xpnn.softmax(X), want)


@pytest.mark.parametrize("axis", [0, 1, -2])
def test_axis_elsewhere(
    library: Any, axis_case: Any, axis: int, close: Callable[..., None], numpy_reference: Callable[..., Any]
) -> None:
    last = axis_case.arrays((2, 3, 4))
    moved = {n: np.moveaxis(a, -1, axis).copy() if a.shape == (2, 3, 4) else a for n, a in last.items()}
    want, want_pullback = numpy_reference(axis_case.kernel.vjp, *axis_case.given(moved), axis=axis, **axis_case.options)
    y, pullback = axis_case.kernel.vjp(*(library.array(a) for a in moved.values()), axis=axis, **axis_case.options)
    close(library.numpy(y), want)
    dy = axis_case.cotangent(want)
    got, expected = pullback(library.array(dy)), want_pullback(dy)
    single = not isinstance(expected, tuple)
    for g, w in zip((got,) if single else got, (expected,) if single else expected, strict=True):
        if w is not None:
            close(library.numpy(g), w)


def test_broadcasting_elsewhere(library: Any, close: Callable[..., None]) -> None:
    p, q, dy = RNG.uniform(0.1, 1, (4, 1)), RNG.uniform(0.1, 1, 6), RNG.normal(size=4)
    y, pullback = xpnn.cross_entropy_probs.vjp(library.array(p), library.array(q))
    close(library.numpy(y), -np.log(p[:, 0]) * q.sum())
    dp, dq = pullback(library.array(dy))
    close(library.numpy(dp), -dy[:, None] * q.sum() / p)
    close(library.numpy(dq), np.broadcast_to(-(dy[:, None] * np.log(p)).sum(0), 6))


def test_jacobian_elsewhere(library: Any, close: Callable[..., None]) -> None:
    close(library.numpy(xpnn.softmax_jacobian(library.array(X))), xpnn.softmax_jacobian(X))


@pytest.mark.parametrize("shape", [(), (0, 3), (3, 0), (1, 1)])
def test_few_elements_elsewhere(library: Any, shape: tuple[int, ...]) -> None:
    x = library.array(np.ones(shape))
    for k in (xpnn.softmax, xpnn.sigmoid):
        y, pullback = k.vjp(x)
        assert library.numpy(y).shape == shape
        assert library.numpy(pullback(y)).shape == shape


def test_integers_elsewhere(library: Any, close: Callable[..., None], numpy_reference: Callable[..., Any]) -> None:
    x = np.array([[0, 1, 2], [3, 1, 0]])
    close(library.numpy(xpnn.softmax(library.array(x))), numpy_reference(xpnn.softmax, x), dtype=np.float64)


def test_target_out_of_range_elsewhere(library: Any) -> None:
    """Eager libraries look, and say where; JAX's semantics are tested in test_semantics.py."""
    if library.name == "jax":
        pytest.skip("JAX arrays are not looked at")
    with pytest.raises(IndexError, match=r"target\[2\]: got 6, expected 0 <= target < 6"):
        xpnn.cross_entropy(library.array(X), library.array([0, 1, 6, 9]))


def test_out_elsewhere(library: Any, close: Callable[..., None]) -> None:
    """Written where arrays can be; forward, pullback, gradient over the logits."""
    if library.name == "jax":
        pytest.skip("JAX arrays cannot be written; refused in test_bad_input.py")
    x, out = library.array(X), library.array(np.zeros_like(X))
    assert xpnn.softmax(x, out=out) is out
    close(library.numpy(out), xpnn.softmax(X))
    target = RNG.integers(0, 6, 4)
    loss, g = xpnn.cross_entropy.value_and_grad(x, library.array(target), out=x)
    assert g is x
    want = xpnn.cross_entropy.value_and_grad(X, target)
    close(library.numpy(loss), want[0])
    close(library.numpy(x), want[1])


def test_explain_elsewhere(library: Any) -> None:
    assert xpnn.softmax.explain(library.array(X)) == "array-api"


# --- torch and JAX in particular --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_of_torch(load_library: Any, dtype: str) -> None:
    torch = load_library("torch").xp
    x = torch.tensor(X, dtype=getattr(torch, dtype))
    y, pullback = xpnn.softmax.vjp(x)
    assert y.dtype == pullback(x).dtype == x.dtype
    assert torch.allclose(y.double(), torch.softmax(x.double(), -1), atol=1e-2)


def test_torch_autograd_passes_through(load_library: Any) -> None:
    """Composed formulas are ordinary tensor operations, so torch may differentiate them too."""
    torch = load_library("torch").xp
    x = torch.tensor(X, requires_grad=True)
    target, dy = torch.tensor([0, 5, 2, 3]), torch.tensor(RNG.normal(size=X.shape))
    (xpnn.softmax(x) * dy).sum().backward()
    assert torch.allclose(x.grad, xpnn.softmax.backward(dy, x=x.detach()), atol=1e-14)
    x.grad = None
    xpnn.cross_entropy(x, target).backward()
    assert torch.allclose(x.grad, xpnn.cross_entropy.value_and_grad(x.detach(), target)[1], atol=1e-14)


def test_every_kernel_under_jit(
    load_library: Any, case: Any, close: Callable[..., None], numpy_reference: Callable[..., Any]
) -> None:
    """Forward and gradients of traced arrays, which have no values to look at."""
    library = load_library("jax")
    import jax

    arrays = case.arrays()
    want, want_pullback = numpy_reference(case.kernel.vjp, *case.given(arrays), **case.options)
    dy = case.cotangent(want)

    @jax.jit
    def both(dy: Any, inputs: dict[str, Any]) -> Any:
        y, pullback = case.kernel.vjp(**inputs, **case.options)
        return y, pullback(dy)

    y, gradients = both(library.array(dy), {n: library.array(a) for n, a in arrays.items()})
    close(library.numpy(y), want)
    expected = want_pullback(dy)
    single = not isinstance(expected, tuple)
    for g, w in zip((gradients,) if single else gradients, (expected,) if single else expected, strict=True):
        assert (g is None) is (w is None)
        if w is not None:
            close(library.numpy(g), w)


def test_jit_of_kernel_objects(load_library: Any, close: Callable[..., None]) -> None:
    library = load_library("jax")
    import jax

    x, target = library.array(X), library.array([0, 1, 2, 3])
    close(library.numpy(jax.jit(xpnn.softmax)(x)), xpnn.softmax(X))
    close(library.numpy(jax.jit(xpnn.cross_entropy)(x, target)), xpnn.cross_entropy(X, np.arange(4)))
    loss, g = jax.jit(xpnn.cross_entropy.value_and_grad)(x, target)
    want = xpnn.cross_entropy.value_and_grad(X, np.arange(4))
    close(library.numpy(loss), want[0])
    close(library.numpy(g), want[1])


def test_jax_differentiates_and_maps(load_library: Any, close: Callable[..., None]) -> None:
    library = load_library("jax")
    import jax

    target = library.array([0, 1, 2, 3])
    g = jax.grad(lambda x: xpnn.cross_entropy(x, target))(library.array(X))
    close(library.numpy(g), xpnn.cross_entropy.value_and_grad(X, np.arange(4))[1])
    close(library.numpy(jax.vmap(xpnn.softmax)(library.array(X))), xpnn.softmax(X))
