"""Kernels of one's own over every kind of array, in several stages, around matrix products. DESIGN sections 1 and 4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import xpnn
from xpnn import Column, Index, Matrix, Row, Scalar

RNG = np.random.default_rng(6)
X, DY = RNG.normal(size=(5, 7)), RNG.normal(size=(5, 7))


@xpnn.kernel(outputs=("y", "n"), saved=("r",))
def affine(xp, x, gain: Column, shift: Row, scale: Scalar):
    """All kinds in, Full and Row out."""
    r = xp.sum(x * gain, axis=-1, keepdims=True)
    return scale * (x * gain) + shift, r * r, r


@affine.backward
def affine_backward(xp, dy, dn, x, gain, shift, scale, r):
    dr = 0.0 if dn is None else 2 * r * dn
    dxg = dr if dy is None else scale * dy + dr
    whole = xp.sum(x * gain * dy, axis=None) if dy is not None else None
    rows = xp.sum(dy, axis=-1, keepdims=True) if dy is not None else None
    return dxg * gain, xp.sum(dxg * x, axis=0, keepdims=True), rows, whole


def test_kinds(backend: str, close: Callable[..., None]) -> None:
    gain, shift, scale, dn = RNG.normal(size=7), RNG.normal(size=5), np.array(1.7), RNG.normal(size=5)
    (y, n), pullback = affine.vjp(X, gain, shift, scale)
    r = X @ gain
    close(y, 1.7 * X * gain + shift[:, None])
    close(n, r**2)
    dxg = 1.7 * DY + (2 * r * dn)[:, None]
    wants = dxg * gain, (dxg * X).sum(0), DY.sum(1), (X * gain * DY).sum()
    for got, want in zip(pullback(DY, dn), wants, strict=True):
        close(got, want)
    no_n = pullback(DY, None)  # an absent cotangent is as good as zeros
    for got, want in zip(no_n, pullback(DY, np.zeros(5)), strict=True):
        close(got, want)
    y2, n2 = np.zeros_like(y), np.zeros_like(n)
    got = affine(X, gain, shift, scale, out=(y2, n2))
    assert got[0] is y2
    assert got[1] is n2
    close(y2, y)
    close(n2, n)


def test_kinds_of_three_dimensions(backend: str, close: Callable[..., None]) -> None:
    x, gain, shift = RNG.normal(size=(2, 7, 3)), RNG.normal(size=7), RNG.normal(size=(2, 3))
    y, n = affine(x, gain, shift, 0.5, axis=1)
    close(y, 0.5 * x * gain[:, None] + shift[:, None, :])
    close(n, (x * gain[:, None]).sum(1) ** 2)


@xpnn.kernel(outputs=("y",))
def standardised(xp, x):
    """Needs all rows twice before it writes any: column sums, then a scalar of them."""
    mean = xp.sum(x, axis=0, keepdims=True) / x.shape[0]
    centred = x - mean
    total = xp.sum(centred * centred, axis=None)
    return centred / xp.sqrt(total)


@pytest.mark.parametrize("rows", [1, 3, 300, 1000])
def test_stages(backend: str, rows: int, close: Callable[..., None]) -> None:
    x = RNG.normal(size=(rows, 9)) + 3
    centred = x - x.mean(0)
    if rows == 1:
        assert np.isnan(standardised(x)).all()
    else:
        close(standardised(x), centred / np.sqrt((centred**2).sum()))


@xpnn.kernel
def mixing(xp, x, w: Matrix, v: Matrix, bias: Column):
    """Two products with work before, between and after them."""
    h = xp.tanh(xp.matmul(xp.exp(-x * x), w) + bias)
    return xp.matmul(h, v.T) * 2


@mixing.backward
def mixing_backward(xp, dy, x, w, v, bias):
    e = xp.exp(-x * x)
    h = xp.tanh(xp.matmul(e, w) + bias)
    dz = xp.matmul(2 * dy, v) * (1 - h * h)
    dx = xp.matmul(dz, w.T) * (-2 * x * e)
    return dx, xp.matmul(e.T, dz), xp.matmul((2 * dy).T, h), xp.sum(dz, axis=0, keepdims=True)


def test_products(backend: str, close: Callable[..., None]) -> None:
    w, v, b, dy = RNG.normal(size=(7, 4)), RNG.normal(size=(3, 4)), RNG.normal(size=4), RNG.normal(size=(5, 3))
    e = np.exp(-X * X)
    h = np.tanh(e @ w + b)
    y, pullback = mixing.vjp(X, w, v, b)
    close(y, 2 * h @ v.T)
    dz = 2 * dy @ v * (1 - h * h)
    for got, want in zip(pullback(dy), (dz @ w.T * (-2 * X * e), e.T @ dz, 2 * dy.T @ h, dz.sum(0)), strict=True):
        close(got, want)


@xpnn.kernel(outputs=("picked", "which"))
def picking(xp, x, index: Index, table: Column):
    """A computed value at an index, a column's value at an index, and the column numbers themselves."""
    chosen = xp.take_along_axis(xp.exp(x), index, axis=-1)
    return chosen * xp.take(table, index, axis=-1), xp.where(xp.arange(x.shape[-1]) == index, x, 0.0)


def test_indices(backend: str, close: Callable[..., None]) -> None:
    index, table, rows = RNG.integers(0, 7, 5), RNG.normal(size=7), np.arange(5)
    picked, which = picking(X, index, table)
    close(picked, np.exp(X[rows, index]) * table[index])
    close(which, np.where(np.arange(7) == index[:, None], X, 0))
    index[3] = -100  # no ignore_index here, so nothing is exempt
    with pytest.raises(IndexError, match=r"picking: index\[3\]: got -100, expected 0 <= index < 7"):
        picking(X, index, table)
    with pytest.raises(TypeError, match="picking: index: got dtype float64, expected integers"):
        picking(X, index * 1.0, table)


NAMES = (
    "n i j k m s first last", "block blocks R C runner threads stop call", "stage0 exp log row lanes np numba float64",
    "t0 t1 size step number0 sum_0 mul_2 types",
)  # fmt: skip


@pytest.mark.parametrize("names", NAMES)
def test_names_of_ones_own(names: str, close: Callable[..., None]) -> None:
    """Inputs, options and outputs may be called anything, whatever the emitted code calls its own."""
    inputs, options = names.split()[::2], names.split()[1::2]
    outputs = (*options, inputs[0])
    scope: dict[str, Any] = {}
    terms = " + ".join(f"xp.exp({i}) * {o}" for i, o in zip(inputs, options, strict=False))
    arguments = ", ".join([*inputs, "*", *(f"{o}=0.5" for o in options)])
    exec(f"def f(xp, {arguments}): return {terms} - xp.sum({inputs[0]}, axis=-1, keepdims=True)", scope)
    values = ", ".join([f"xp.exp(x) * {k + 1}" for k in range(len(options))] + ["xp.max(x, axis=-1, keepdims=True)"])
    exec(f"def g(xp, x): return {values}", scope)
    arrays, numbers = RNG.normal(size=(len(inputs), 5, 7)), dict(zip(options, (0.25, 2.0, -1.0, 0.75), strict=True))
    with xpnn.use_backend("numba"):
        found = xpnn.kernel(scope["f"])(*arrays, **numbers)
        results = xpnn.kernel(outputs=outputs)(scope["g"])(X)
    want = sum(np.exp(a) * b for a, b in zip(arrays, numbers.values(), strict=False))
    close(found, want - arrays[0].sum(-1, keepdims=True))
    for k, got in enumerate(results[:-1]):
        close(got, np.exp(X) * (k + 1))
    close(results[-1], X.max(-1))
