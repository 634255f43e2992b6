"""layer_norm and rms_norm: PyTorch's values and gradients, rows of several axes, and what may go wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import xpnn
from xpnn.backends.arrays import numpy_dtype

RNG = np.random.default_rng(0)
SHAPES = {"last": (6,), "two": (5, 6), "all": (3, 4, 5, 6)}


def arguments(name: str, span: tuple[int, ...], weighted: bool) -> list[np.ndarray]:
    x = RNG.normal(1.0, 2.0, (3, 4, 5, 6))
    return [x, *(RNG.normal(size=span) for _ in range(2 if name == "layer_norm" else 1) if weighted)]


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weights"])
@pytest.mark.parametrize("span", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_as_pytorch(
    name: str, span: tuple[int, ...], weighted: bool, backend: str, close: Callable[..., None], load_library: Any
) -> None:
    torch = load_library("torch").xp
    arrays = arguments(name, span, weighted)
    dy = RNG.normal(size=arrays[0].shape)
    x, *weights = (torch.from_numpy(a).requires_grad_() for a in arrays)
    want = getattr(torch.nn.functional, name)(x, span, *weights)
    want.backward(torch.from_numpy(dy))
    y, pullback = getattr(xpnn, name).vjp(arrays[0], span, *arrays[1:])
    close(y, want.detach().numpy())
    for ours, tensor in zip(pullback(dy), (x, *weights), strict=True):
        close(ours, tensor.grad.numpy(), terms=np.abs(dy).max())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_eps_of_rms_norm(dtype: str, backend: str, load_library: Any) -> None:
    """Left out, it is that of what is computed with, which decides where the numbers are small."""
    torch = load_library("torch").xp
    tensor = (torch.arange(1.0, 9.0)[None] * 1e-4).to(getattr(torch, dtype))
    x = tensor.float().numpy().astype(numpy_dtype(dtype))
    want = torch.nn.functional.rms_norm(tensor, (8,)).double().numpy()
    np.testing.assert_allclose(
        xpnn.rms_norm(x).astype(np.float64), want, rtol={"float16": 1e-3, "bfloat16": 8e-3}.get(dtype, 1e-6)
    )
    np.testing.assert_array_equal(xpnn.rms_norm(x, eps=0), xpnn.rms_norm(x, eps=0.0))


@pytest.mark.parametrize("eps", [0.0, -0.25, -1e3, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_any_eps_as_pytorch(name: str, eps: float, backend: str, load_library: Any) -> None:
    """A negative one too: where the sum under the root is positive it is used, elsewhere the row is NaN."""
    torch = load_library("torch").xp
    x = np.array([[1.0, 2.0, 4.0], [2.0, 2.0, 2.0], [0.01, 0.02, -0.02]])
    want = getattr(torch.nn.functional, name)(torch.from_numpy(x), (3,), eps=eps)
    np.testing.assert_allclose(getattr(xpnn, name)(x, eps=eps), want.numpy(), rtol=1e-12)


def test_a_variance_beside_a_large_mean(backend: str) -> None:
    """mean(x²) − mean(x)² would have lost all of it."""
    x = np.array([[10000.0, 10001.0, 10002.0, 10003.0]], dtype="float32")
    np.testing.assert_allclose(xpnn.layer_norm(x), xpnn.layer_norm(x - 10000), rtol=1e-6)
    assert np.all(xpnn.layer_norm(np.full((2, 5), 3.0)) == 0)
    assert np.isnan(xpnn.layer_norm(np.array([[1.0, np.nan], [1.0, np.inf]]))).all()


def test_rows_of_several_axes(backend: str, close: Callable[..., None]) -> None:
    """They lie where the caller has them; saved values have the shape of what is left."""
    x, weight = RNG.normal(size=(3, 2, 4)), RNG.normal(size=(2, 4))
    flat = xpnn.rms_norm(x.reshape(3, 8), weight=weight.ravel()).reshape(x.shape)
    close(xpnn.rms_norm(x, (2, 4), weight), flat)
    close(xpnn.rms_norm(np.asfortranarray(x), [2, 4], weight), flat)
    out = np.empty_like(x)
    assert xpnn.rms_norm(x, (2, 4), weight, out=out) is out
    close(out, flat)
    dy = RNG.normal(size=x.shape)
    _, pullback = xpnn.rms_norm.vjp(x, (2, 4), weight)
    for ours, alone in zip(pullback(dy), xpnn.rms_norm.backward(dy, x, weight, normalized_shape=(2, 4)), strict=True):
        close(ours, alone)
    close(xpnn.layer_norm(x, normalized_shape=4), xpnn.layer_norm(x))
    cube = RNG.normal(size=(4, 4, 4))  # saved values would fit any axis
    saved = {"mean": cube.mean(-1), "rstd": 1 / np.sqrt(cube.var(-1) + 1e-5)}
    dcube = RNG.normal(size=cube.shape)
    close(xpnn.layer_norm.backward(dcube, x=cube, **saved)[0], xpnn.layer_norm.vjp(cube)[1](dcube)[0])


@pytest.mark.parametrize("columns", [1, 3, 7, 16, 20, 100, 130, 1000])
def test_constant_rows(backend: str, columns: int) -> None:
    """They come out as 0, and their variance too, however large: a mean off by its last bit would be taken for a deviation."""
    values = (RNG.uniform(1, 10, 64) * 10.0 ** RNG.integers(-3, 5, 64)).astype(np.float32)
    y, pullback = xpnn.layer_norm.vjp(np.repeat(values[:, None], columns, 1))
    np.testing.assert_array_equal(y, 0)
    dy = RNG.normal(size=y.shape).astype(np.float32)
    expected = (dy - dy.mean(1, keepdims=True)) / np.sqrt(1e-5)
    np.testing.assert_allclose(pullback(dy)[0], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda x: xpnn.layer_norm(x, (2, 5)), ValueError, "normalized_shape: got (2, 5), expected the end of x's shape"),
    (lambda x: xpnn.layer_norm(x, (1, 3, 2, 4)), ValueError, "normalized_shape: got (1, 3, 2, 4)"),
    (lambda x: xpnn.layer_norm(x, (2, 4), x[0, 0]), ValueError, "weight: got shape (4,), expected normalized_shape's"),
    (lambda x: xpnn.layer_norm(x, None, x[0, 0, :3]), ValueError, "layer_norm: weight: got shape (3,), expected (4,)"),
    (lambda x: xpnn.layer_norm(x, 4.0), TypeError, "normalized_shape: got 4.0, expected an integer, or a tuple"),
    (lambda x: xpnn.layer_norm(x, ()), TypeError, "normalized_shape: got (), expected"),
    (lambda x: xpnn.layer_norm(x, 4, normalized_shape=4), TypeError, "layer_norm: normalized_shape was given twice"),
    (lambda x: xpnn.layer_norm(x, axis=1), TypeError, "got an unexpected argument 'axis', expected one of bias, eps, normal"),
    (lambda x: xpnn.rms_norm(x, eps="tiny"), TypeError, "rms_norm: eps: got 'tiny', expected a number or None"),
    (lambda x: xpnn.rms_norm(x, eps=np.array(0.1)), TypeError, "rms_norm: eps: got array(0.1), expected something hashable"),
    (lambda x: xpnn.layer_norm(x, eps=np.array(0.1)), TypeError, "layer_norm: eps: got array(0.1), expected a number"),
    (lambda x: xpnn.layer_norm(x[0, 0, 0]), ValueError, "layer_norm: x: got shape (), expected at least one dimension"),
    (lambda x: xpnn.rms_norm.vjp(1.0), ValueError, "rms_norm: x: got shape (), expected at least one dimension"),
    (lambda x: xpnn.layer_norm(x[0, 0, 0], 1), ValueError, "layer_norm: x: got shape (), expected at least one dimension"),
    (lambda x: xpnn.rms_norm.backward(1.0, 1.0), ValueError, "rms_norm.backward: dy: got shape (), expected at least one"),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_bad_input(call: Callable[..., Any], error: type[Exception], message: str, backend: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call(np.ones((3, 2, 4)))


def test_limits_in_a_formula(backend: str) -> None:
    """`xp.finfo` of a formula is that of the dtype it is computed in."""

    @xpnn.kernel
    def above_one(xp: Any, x: Any) -> Any:
        return x + xp.finfo(x.dtype).eps

    for dtype in ("float32", "float64"):
        assert above_one(np.ones((2, 3), dtype))[0, 0] == np.nextafter(np.ones((), dtype), np.array(2, dtype))


@pytest.mark.parametrize("columns", [1000, 4599, 32000, 128256, 256000])
def test_a_long_sum_of_equal_terms(columns: int) -> None:
    """Partial sums are rounded the same way, and errors do not cancel: 200 ULP where those are added in single precision."""
    x = np.full((2, columns), -2.3, np.float32)
    x[:, 0] = 0
    truth = xpnn.softmax(x.astype(np.float64))
    assert np.max(np.abs(xpnn.softmax(x) - truth) / np.spacing(truth.astype(np.float32))) <= 4
    planes = xpnn.softmax(np.ascontiguousarray(x.T), axis=0)
    np.testing.assert_array_equal(planes.T, xpnn.softmax(x))


def test_the_short_way(close: Callable[..., None], numpy_reference: Callable[..., Any]) -> None:
    """Calls seen before have one, which leaves to the long way whatever is not as it was."""
    x, weight, bias = RNG.normal(size=(4, 6)), RNG.normal(size=6), RNG.normal(size=6)
    for _ in range(2):
        y, pullback = xpnn.layer_norm.vjp(x, 6, weight, bias)
        for ours, want in zip(pullback(x), numpy_reference(xpnn.layer_norm.vjp, x, 6, weight, bias)[1](x), strict=True):
            close(ours, want)
        close(xpnn.layer_norm(x, (6,), weight, bias), y)
        close(xpnn.layer_norm(x, None, weight[::-1], bias), numpy_reference(xpnn.layer_norm, x, None, weight[::-1], bias))
        for k, message in enumerate(("normalized_shape: got", "weight: got shape", "bias: got shape")):
            given: list[Any] = [None if k else (5,), weight, bias]
            given[k] = given[k][:-1] if k else given[k]
            with pytest.raises(ValueError, match=message):
                xpnn.layer_norm(x, *given)
        with pytest.raises(ValueError, match=r"layer_norm pullback: dy: got shape \(3, 6\)"):
            pullback(x[:3])
        out = tuple(np.empty_like(a) for a in (x, weight, bias))
        assert all(a is b for a, b in zip(pullback(x, out=out), out, strict=True))
