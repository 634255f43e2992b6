"""Shapes, axes and memory layouts: any of them, and the same numbers. DESIGN sections 1 and 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import xpnn

RNG = np.random.default_rng(4)
ELEMENTWISE = ["sigmoid", "tanh", "relu", "log"]
ROWS = ["softmax", "log_softmax", "logsumexp"]


def padded(a: np.ndarray) -> np.ndarray:
    """Rows with a gap between them."""
    big = (
        np.full((*a.shape[:-1], a.shape[-1] + 3), np.nan, a.dtype)
        if a.dtype.kind == "f"
        else np.zeros((*a.shape[:-1], a.shape[-1] + 3), a.dtype)
    )
    big[..., : a.shape[-1]] = a
    return big[..., : a.shape[-1]]


def every_other(a: np.ndarray) -> np.ndarray:
    big = np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
    big[..., ::2] = a
    return big[..., ::2]


def backwards(a: np.ndarray) -> np.ndarray:
    """Negative strides along every axis."""
    every = (slice(None, None, -1),) * a.ndim
    return a[every].copy()[every]


def unaligned(a: np.ndarray) -> np.ndarray:
    memory = np.zeros(a.nbytes + 1, np.uint8)[1:]
    view = memory.view(a.dtype) if a.dtype.itemsize == 1 else np.ndarray(a.shape, a.dtype, memory.data)
    view[...] = a
    return view


def swapped(a: np.ndarray) -> np.ndarray:
    return a.astype(a.dtype.newbyteorder())


def repeated(a: np.ndarray) -> np.ndarray:
    """A stride of zero along the first axis; its rows are all the first one."""
    return np.broadcast_to(a[:1], a.shape)


LAYOUTS = [padded, every_other, backwards, unaligned, swapped, np.asfortranarray, repeated]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_layouts(backend: str, case: Any, layout: Callable[[np.ndarray], np.ndarray], close: Callable[..., None]) -> None:
    """Forward and gradients of every kernel from arrays laid out in any way."""
    arrays = {n: layout(a) if a.ndim else a for n, a in case.arrays().items()}
    plain = {n: np.array(a, a.dtype.newbyteorder("="), order="C") for n, a in arrays.items()}
    y, pullback = case.kernel.vjp(*case.given(arrays), **case.options)
    want, want_pullback = case.kernel.vjp(*case.given(plain), **case.options)
    close(y, want)
    close(case.kernel(*case.given(arrays), **case.options), want)
    dy = case.cotangent(want)
    got, expected = pullback(layout(dy) if dy.ndim else dy), want_pullback(np.array(layout(dy) if dy.ndim else dy, float))
    single = isinstance(expected, np.ndarray)
    for g, w in zip((got,) if single else got, (expected,) if single else expected, strict=True):
        if w is not None:
            close(g, w)


AXES = [(s, a) for s in ((2, 3, 4), (3, 3, 3), (5, 5), (1, 3, 3), (3, 3, 1)) for a in range(-len(s), len(s))]


@pytest.mark.parametrize(("shape", "axis"), AXES)
def test_axis(backend: str, axis_case: Any, shape: tuple[int, ...], axis: int, close: Callable[..., None]) -> None:
    """Along any axis equals moving it last, forward and backward; also where shapes do not tell axes apart."""
    last = axis_case.arrays(shape)
    d = axis_case.kernel.declaration
    full = {n for n, a in last.items() if a.shape == shape}
    moved = {n: np.ascontiguousarray(np.moveaxis(a, -1, axis)) if n in full else a for n, a in last.items()}
    y, pullback = axis_case.kernel.vjp(*axis_case.given(moved), axis=axis, **axis_case.options)
    want, want_pullback = axis_case.kernel.vjp(*axis_case.given(last), axis=-1, **axis_case.options)
    back = np.moveaxis(np.asarray(y), axis, -1) if np.shape(want) == shape else y
    close(back, want)
    dy = axis_case.cotangent(want)
    got = pullback(np.moveaxis(dy, -1, axis) if dy.shape == shape else dy)
    expected = want_pullback(dy)
    if len(d.inputs) == 1:
        got, expected = (got,), (expected,)
    for name, g, w in zip(last, got, expected, strict=True):
        if w is not None:
            assert g.shape == moved[name].shape
            close(np.moveaxis(g, axis, -1) if name in full else g, w)


@pytest.mark.parametrize(
    ("shape", "axis"), [((5,), -1), ((5,), 0), ((2, 5, 3), 1), ((2, 5, 3, 4), 1), ((2, 5, 3, 4), -3), ((2, 3, 4, 5), -1)]
)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_cross_entropy_of_any_shape(
    backend: str, shape: tuple[int, ...], axis: int, reduction: str, close: Callable[..., None]
) -> None:
    logits = RNG.normal(size=shape)
    lead = shape[:axis] + shape[axis % len(shape) + 1 :]
    target = RNG.integers(0, 5, lead)
    x = np.moveaxis(logits, axis, -1)
    p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    hit = np.eye(5)[target]
    loss = -(hit * np.log(p)).sum(-1)
    count = loss.size if reduction == "mean" else 1
    y, pullback = xpnn.cross_entropy.vjp(logits, target, axis=axis, reduction=reduction)
    close(y, loss.mean() if reduction == "mean" else loss)
    dy = np.asarray(RNG.normal(size=np.shape(y)))
    dx, none = pullback(dy)
    assert none is None
    close(dx, np.moveaxis((dy[..., None] if dy.ndim else dy) * (p - hit) / count, -1, axis))


def test_pytorch_layout_of_images(backend: str) -> None:
    """Given an axis, no shape is ambiguous."""
    logits, target = RNG.normal(size=(3, 3, 3)), RNG.integers(0, 3, (3, 3))
    last = xpnn.cross_entropy(logits, target, axis=-1)
    assert last == pytest.approx(xpnn.cross_entropy(np.moveaxis(logits, -1, 1), target, axis=1), rel=1e-14)
    assert last == pytest.approx(xpnn.cross_entropy(logits.reshape(9, 3), target.reshape(9)), rel=1e-14)
    assert last != pytest.approx(xpnn.cross_entropy(logits, target, axis=1), rel=1e-3)


# --- few elements, and none ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ELEMENTWISE, *ROWS])
def test_zero_dimensions(backend: str, name: str) -> None:
    """0-d is one row of one column."""
    k = getattr(xpnn, name)
    want = {
        "sigmoid": 1 / (1 + np.exp(-0.7)), "tanh": np.tanh(0.7), "relu": 0.7, "log": np.log(0.7),
        "softmax": 1.0, "log_softmax": 0.0, "logsumexp": 0.7,
    }[name]  # fmt: skip
    slope = {"sigmoid": want * (1 - want), "tanh": 1 - want**2, "log": 1 / 0.7, "softmax": 0.0, "log_softmax": 0.0}.get(
        name, 1.0
    )
    for x in (np.array(0.7), np.float64(0.7), 0.7):
        y, pullback = k.vjp(x)
        assert np.shape(y) == ()
        assert y == pytest.approx(want, rel=1e-14)
        g = pullback(2.0)
        assert np.shape(g) == ()
        assert g == pytest.approx(2 * slope, rel=1e-13)
    assert np.shape(k(np.float32(0.7))) == ()
    assert k(np.float32(0.7)).dtype == np.float32


def test_zero_rows(backend: str, case: Any) -> None:
    """Nothing in, nothing out; sums over no rows are zero, and means are NaN."""
    arrays = case.arrays((0, 7))
    y, pullback = case.kernel.vjp(*case.given(arrays), **case.options)
    dy = case.cotangent(y)
    gradients = pullback(dy)
    assert np.size(y) in (0, 1)
    if np.size(y):
        assert np.isnan(y) == (case.options.get("reduction", "mean") == "mean")
    single = isinstance(gradients, np.ndarray)
    for a, g in zip(arrays.values(), (gradients,) if single else gradients, strict=True):
        if g is not None:
            assert g.shape == a.shape
            assert not g.any()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 0), (2, 0, 3)])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_nothing_at_all(backend: str, name: str, shape: tuple[int, ...]) -> None:
    y, pullback = getattr(xpnn, name).vjp(np.ones(shape, np.float32))
    assert y.shape == shape
    assert y.dtype == np.float32
    assert pullback(y).shape == shape


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 0), (2, 0, 3), (2, 3, 0)])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_no_columns(backend: str, name: str, shape: tuple[int, ...]) -> None:
    for axis in range(len(shape)):
        y, pullback = getattr(xpnn, name).vjp(np.ones(shape), axis=axis)
        assert y.shape == shape
        assert pullback(y).shape == shape


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (1,), (1, 1, 1), (1, 5, 1)])
def test_one_row_or_column(backend: str, axis_case: Any, shape: tuple[int, ...], close: Callable[..., None]) -> None:
    """Against the same call on a block of which this is a part."""
    arrays = axis_case.arrays(shape)
    options = axis_case.options | {"axis": -1}
    y, pullback = axis_case.kernel.vjp(*axis_case.given(arrays), **options)
    with xpnn.use_backend("numpy"):
        want, want_pullback = axis_case.kernel.vjp(*axis_case.given(arrays), **options)
    dy = axis_case.cotangent(want)
    close(y, want)
    single = len(axis_case.kernel.declaration.inputs) == 1
    got, expected = pullback(dy), want_pullback(dy)
    for g, w in zip((got,) if single else got, (expected,) if single else expected, strict=True):
        if w is not None:
            close(g, w, ulps=256, terms=float(shape[-1] == 1))  # of one class, p - y is zero but for rounding
    if shape[-1] == 1 and axis_case.name in ("softmax", "log_softmax"):
        assert (y == (axis_case.name == "softmax")).all()


@pytest.mark.parametrize("columns", [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 255, 257, 1025])
def test_widths(backend: str, columns: int, close: Callable[..., None]) -> None:
    """On each side of the vector widths and the blocks that sums are cut into."""
    x, dy = RNG.normal(size=(3, columns)), RNG.normal(size=(3, columns))
    e = np.exp(x)
    p = e / e.sum(-1, keepdims=True)
    close(xpnn.softmax(x), p)
    close(xpnn.logsumexp(x), np.log(e.sum(-1)))
    close(xpnn.softmax.backward(dy, y=p), p * (dy - (dy * p).sum(-1, keepdims=True)))
    close(xpnn.sigmoid(x), 1 / (1 + 1 / e))
    target = np.array([0, columns - 1, columns // 2])
    loss, g = xpnn.cross_entropy.value_and_grad(x, target)
    close(loss, -np.log(p[np.arange(3), target]).mean())
    close(g, (p - (np.arange(columns) == target[:, None])) / 3)


# --- broadcasting and leading dimensions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probs", "target"),
    [((5,), (4, 5)), ((4, 5), (5,)), ((4, 1), (4, 5)), ((3, 1, 5), (4, 5)), ((1, 4, 5), (3, 1, 5)), ((), (4, 5))],
)
def test_broadcasting(backend: str, probs: tuple[int, ...], target: tuple[int, ...], close: Callable[..., None]) -> None:
    """Inputs are repeated as NumPy does, and their gradients summed back."""
    p, q = RNG.uniform(0.1, 1, probs), RNG.uniform(0.1, 1, target)
    terms = -q * np.log(p)
    y, pullback = xpnn.cross_entropy_probs.vjp(p, q)
    close(y, terms.sum(-1))
    dy = RNG.normal(size=terms.shape[:-1])
    dp, dq = pullback(dy)
    wide = np.broadcast_to(dy[..., None], terms.shape)
    close(dp, summed(-wide * q / p, probs))
    close(dq, summed(-wide * np.log(p), target))
    outs = np.zeros(probs), np.zeros(target)
    assert pullback(dy, out=outs)[0] is outs[0]
    close(outs[0], dp)
    close(outs[1], dq)


def summed(a: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    a = a.sum(tuple(range(a.ndim - len(shape))))
    return a.sum(tuple(i for i, n in enumerate(shape) if n != a.shape[i]), keepdims=True)


@pytest.mark.parametrize("lead", [(), (1,), (6,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("activation", [None, xpnn.sigmoid], ids=["plain", "sigmoid"])
def test_linear_with_leading_dimensions(
    backend: str, lead: tuple[int, ...], activation: Any, close: Callable[..., None]
) -> None:
    x, w, b = RNG.normal(size=(*lead, 5)), RNG.normal(size=(3, 5)), RNG.normal(size=3)
    z = x @ w.T + b
    g = 1 / (1 + np.exp(-z)) if activation else z
    y, pullback = xpnn.linear.vjp(x, w, b, activation=activation)
    close(y, g)
    dy = RNG.normal(size=y.shape)
    dz = dy * g * (1 - g) if activation else dy
    dx, dw, db = pullback(dy)
    close(dx, dz @ w)
    close(dw, dz.reshape(-1, 3).T @ x.reshape(-1, 5))
    close(db, dz.reshape(-1, 3).sum(0))
