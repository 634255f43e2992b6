"""`@xpnn.kernel`: what is refused when it is declared, what specialises, and kernels of one's own. DESIGN section 1."""

from __future__ import annotations

import inspect
import pydoc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import xpnn

RNG = np.random.default_rng(6)
X, DY = RNG.normal(size=(5, 7)), RNG.normal(size=(5, 7))


@xpnn.kernel
def swish(xp, x, *, beta=1.0):
    """DESIGN section 2's example, as a user would write it."""
    return x / (1 + xp.exp(-beta * x))


@swish.backward
def swish_backward(xp, dy, x, *, beta=1.0):
    s = 1 / (1 + xp.exp(-beta * x))
    return dy * (s + beta * x * s * (1 - s))


# --- refused when declared ------------------------------------------------------------------------------------------------


def no_xp(x):
    return x


def xp_last(x, xp):
    return x


def no_inputs(xp, *, beta=1.0):
    return beta


def no_default(xp, x, *, beta):
    return x


def star(xp, *x):
    return x


def stars(xp, x, **more):
    return x


def number_default(xp, x, y=1.0):
    return x


def named_out(xp, x, *, out=1.0):
    return x


def named_axis(xp, x, axis):
    return x


def named_wrt(xp, x, *, wrt="x"):
    return x


def named_y(xp, y):
    return y


def fine(xp, x, *, beta=1.0):
    return x * beta


@pytest.mark.parametrize(
    ("formula", "settings", "pieces"),
    [
        (no_xp, {}, ["no_xp", "first parameter must be xp", "x"]),
        (xp_last, {}, ["xp_last", "first parameter must be xp"]),
        (no_inputs, {}, ["no_inputs", "at least one input"]),
        (no_default, {}, ["no_default", "beta", "needs a default"]),
        (star, {}, ["star", "*x"]),
        (stars, {}, ["stars", "*more"]),
        (number_default, {}, ["number_default", "y", "None only", "1.0"]),
        (named_out, {}, ["named_out", "'out'"]),
        (named_axis, {}, ["named_axis", "'axis'"]),
        (named_wrt, {}, ["named_wrt", "'wrt'"]),
        (named_y, {}, ["named_y", "'y'", "two things"]),
        (fine, {"off": {"gamma": 0.0}}, ["fine", "off", "'gamma'", "not an option"]),
        (fine, {"outputs": ("x",)}, ["fine", "'x'", "two things"]),
        (fine, {"saved": ("y",)}, ["fine", "'y'", "two things"]),
        (fine, {"saved": ("beta",)}, ["fine", "'beta'", "two things"]),
        (fine, {"outputs": ()}, ["fine", "outputs"]),
        (fine, {"wrt": ("z",)}, ["fine", "wrt", "'z'"]),
        (fine, {"domain": {"z": "positive"}}, ["fine", "domain", "'z'"]),
        (fine, {"variants": ({"gamma": 1},)}, ["fine", "variants", "'gamma'"]),
        (fine, {"wide": "x"}, ["kernel fine: wide: got 'x', expected a tuple of names"]),
        (fine, {"saved": "s"}, ["kernel fine: saved: got 's', expected a tuple of names"]),
        (fine, {"outputs": "yz"}, ["kernel fine: outputs: got 'yz', expected a tuple of names"]),
        (fine, {"wrt": "x"}, ["kernel fine: wrt: got 'x', expected a tuple of names"]),
        (fine, {"wide": (1,)}, ["kernel fine: wide: got (1,), expected a tuple of names"]),
        (fine, {"saved": 1}, ["kernel fine: saved: got 1, expected a tuple of names"]),
        (fine, {"variants": {"beta": 2.0}}, ["kernel fine: variants: got {'beta': 2.0}, expected a tuple of dicts"]),
        (fine, {"variants": ("beta",)}, ["kernel fine: variants: got ('beta',), expected a tuple of dicts"]),
        (fine, {"off": "beta"}, ["kernel fine: off: got 'beta', expected a dict"]),
        (fine, {"domain": "x"}, ["kernel fine: domain: got 'x', expected a dict"]),
    ],
    ids=lambda v: v.__name__ if inspect.isfunction(v) else None,
)  # fmt: skip
def test_refused(formula: Any, settings: dict[str, Any], pieces: list[str]) -> None:
    with pytest.raises(TypeError) as raised:
        xpnn.kernel(**settings)(formula) if settings else xpnn.kernel(formula)
    assert [p for p in pieces if p not in str(raised.value)] == [], str(raised.value)


def test_backward_refused() -> None:
    k = xpnn.kernel(saved=("m",))(fine)

    for bad, piece in (
        (lambda xp, dy, z: dy, "'z'"), (lambda xp, dy, x, gamma: dy, "'gamma'"), (lambda xp, dz: dz, "'dz'"),
        (lambda dy, x: dy, "xp"), (lambda xp, dx: dx, "'dx'"), (lambda xp, dy, s: dy, "'s'"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="backward of fine") as raised:
            k.backward(bad)
        assert piece in str(raised.value)
    with pytest.raises(TypeError, match="no backward"):
        k.vjp(X)


def test_help_without_docstrings() -> None:
    """It shows the kernel and its signature, not the class."""
    k = xpnn.kernel(fine)
    texts = []
    for attach, signature in (
        (lambda formula: None, "formula, /"),
        (k.backward, "dy, x=None, *, beta=1.0, wrt=None, out=None"),
    ):
        attach(lambda xp, dy, x, *, beta=1.0: dy * beta)
        for shown, head in ((k, "fine(x, *, beta=1.0, out=None)"), (k.backward, f"fine.backward({signature})")):
            page = pydoc.plain(pydoc.render_doc(shown))
            assert head in page
            assert shown.__doc__ in page
            texts.append(shown.__doc__)
    assert texts == [
        "The kernel fine, whose formula has no docstring.",
        "Decorate a function (xp, dy, ...) with this, to give fine the backward that it lacks.",
        "The kernel fine, whose formula has no docstring.",
        "The gradients of fine, whose formula has no docstring.",
    ]


def test_wrong_number_of_results() -> None:
    k = xpnn.kernel(outputs=("y", "z"))(lambda xp, x: x + 1)
    with pytest.raises(TypeError, match=r"returned 1 values, declared are \('y', 'z'\)"):
        k(X)
    two = xpnn.kernel(lambda xp, x, w: x * w)
    two.backward(lambda xp, dy, x, w: dy * w)
    with pytest.raises(TypeError, match=r"returned 1 gradients, expected 2"):
        two.vjp(X, X)[1](DY)


def test_decorators_return_what_was_promised() -> None:
    @xpnn.kernel
    def k(xp, x):
        """Doc."""
        return x * 2

    @k.backward
    def k_backward(xp, dy):
        """Twice."""
        return dy * 2

    assert isinstance(k, xpnn.Kernel)
    assert inspect.isfunction(k_backward)
    assert (k.__doc__, k.backward.__doc__) == ("Doc.", "Twice.")
    np.testing.assert_array_equal(k.vjp(X)[1](DY), 2 * DY)


# --- a kernel of one's own ------------------------------------------------------------------------------------------------


def swish64(x: Any, beta: float) -> np.ndarray:
    return x / (1 + np.exp(-beta * x))


def swish_slope64(x: Any, beta: float) -> np.ndarray:
    s = 1 / (1 + np.exp(-beta * x))
    return s + beta * x * s * (1 - s)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("beta", [1.0, 2.5, 0])
def test_swish(backend: str, beta: float, dtype: Any, close: Callable[..., None]) -> None:
    x, dy = X.astype(dtype), DY.astype(dtype)
    y, pullback = swish.vjp(x, beta=beta)
    close(y, swish64(x.astype(float), beta), dtype=dtype)
    close(pullback(dy), dy.astype(float) * swish_slope64(x.astype(float), beta), dtype=dtype)
    close(swish.backward(dy, x, beta=beta), dy.astype(float) * swish_slope64(x.astype(float), beta), dtype=dtype)
    assert swish.explain(x) == backend


def test_swish_elsewhere(library: Any, close: Callable[..., None]) -> None:
    x, dy = library.array(X), library.array(DY)
    y, pullback = swish.vjp(x, beta=0.5)
    close(library.numpy(y), swish64(X, 0.5))
    close(library.numpy(pullback(dy)), DY * swish_slope64(X, 0.5))


# --- what specialises -----------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the modules that are loaded from now on."""
    from xpnn.backends.numba import cache

    names: list[str] = []
    original = cache.load
    monkeypatch.setattr(cache, "load", lambda name, text: names.append(name) or original(name, text))
    return names


def test_run_time_numbers_recompile_nothing(compiled: list[str], close: Callable[..., None]) -> None:
    k = xpnn.kernel(lambda xp, x, *, beta=1.0, shift=1: x * beta + shift)
    close(k(X, beta=0.25, shift=3), X * 0.25 + 3)
    first = len(compiled)
    assert first == 1
    for beta in (0.5, 1.0, 0.0, -3.0, 2):
        for _ in range(2):
            close(k(X, beta=beta, shift=-2), X * beta - 2)
    assert len(compiled) == first


def test_off_values_specialise(compiled: list[str], close: Callable[..., None]) -> None:
    traced = []

    @xpnn.kernel(off={"eps": 0.0})
    def k(xp, x, *, eps=0.0):
        if eps:
            traced.append("on")
            return (1 - eps) * x + eps
        traced.append("off")
        return x * 1.5

    close(k(X), X * 1.5)
    close(k(X, eps=0.25), 0.75 * X + 0.25)
    assert len(compiled) == 2
    assert {"on", "off"} == set(traced)
    close(k(X, eps=0.5), 0.5 * X + 0.5)
    close(k(X, eps=0), X * 1.5)
    assert len(compiled) == 2
    assert "eps" in k.source(eps=0.1)
    assert "eps" not in k.source()


def test_words_specialise(compiled: list[str], close: Callable[..., None]) -> None:
    @xpnn.kernel
    def k(xp, x, *, mode="half", flip=False):
        y = x * (0.5 if mode == "half" else 2.0)
        return -y if flip else y

    close(k(X), X / 2)
    close(k(X, mode="twice"), X * 2)
    close(k(X, mode="twice", flip=True), X * -2)
    assert len(compiled) == 3
    close(k(X, flip=False, mode="half"), X / 2)
    assert len(compiled) == 3


def test_absent_inputs_specialise(backend: str, close: Callable[..., None]) -> None:
    @xpnn.kernel
    def k(xp, x, scale=None):
        return x if scale is None else x * scale

    @k.backward
    def k_backward(xp, dy, x, scale):
        return (dy, None) if scale is None else (dy * scale, dy * x)

    close(k(X), X)
    close(k(X, DY), X * DY)
    assert [g.shape for g in k.vjp(X)[1](DY)] == [(5, 7)]
    dx, dscale = k.vjp(X, X)[1](DY)
    close(dx, DY * X)
    close(dscale, DY * X)


# --- leaving the subset -----------------------------------------------------------------------------------------------------


def branches(xp, x, *, beta=1.0):
    if beta > 0.5:  # a run-time number
        return x * beta
    return x


def sorts(xp, x):
    return xp.sort(x, axis=-1)


def indexes(xp, x):
    return x * x[:, :1]


def casts(xp, x):
    return x * float(xp.max(x))


@pytest.mark.parametrize(
    ("formula", "line", "piece", "want"),
    [
        (sorts, 1, "xp.sort", np.sort(X, -1)),
        (indexes, 1, "indexes an array", X * X[:, :1]),
        (casts, 1, "", X * X.max()),
    ],
    ids=lambda v: v.__name__ if inspect.isfunction(v) else None,
)
def test_outside_the_subset(formula: Any, line: int, piece: str, want: np.ndarray, close: Callable[..., None]) -> None:
    """By name: an error with file and line. auto: composed, and explain says why."""
    k = xpnn.kernel(formula)
    where = f"{__file__}:{inspect.getsourcelines(formula)[1] + line}"
    with xpnn.use_backend("numba"), pytest.raises(xpnn.BackendError) as raised:
        k(X)
    assert where in str(raised.value)
    assert "'auto'" in str(raised.value)
    assert piece in str(raised.value)
    close(k(X), want)
    reason = k.explain(X)
    assert reason.startswith("array-api")
    assert where in reason
    with xpnn.use_backend("numpy"):
        close(k(X), want)


@pytest.mark.parametrize("name", ["auto", "numba"])
def test_branching_on_a_number(name: str, close: Callable[..., None]) -> None:
    """An error wherever fusion is tried, naming the line; composed by name, the formula is just Python."""
    k = xpnn.kernel(branches)
    with xpnn.use_backend(name), pytest.raises((TypeError, xpnn.BackendError)) as raised:
        k(X, beta=0.75)
    assert f"{__file__}:{inspect.getsourcelines(branches)[1] + 1}" in str(raised.value)
    assert "branches on a value that is known only at run time" in str(raised.value)
    with xpnn.use_backend("numpy"):
        close(k(X, beta=0.75), 0.75 * X)
        close(k(X, beta=0.25), X)


def branches_on_data(xp, x):
    if x > 0:
        return x
    return -x


@pytest.mark.parametrize("name", ["auto", "numba", "numpy"])
def test_branching_on_an_array(name: str) -> None:
    """Not even of one element: shapes are found for all sizes at once."""
    k = xpnn.kernel(branches_on_data)
    where = f"{__file__}:{inspect.getsourcelines(branches_on_data)[1] + 1}: in branches_on_data: "
    for x in (np.array([1.0]), X):
        for call in (k, k.explain):
            with xpnn.use_backend(name), pytest.raises(TypeError) as raised:
                call(x)
            assert str(raised.value).startswith(where + "it branches on a value that is known only at run time; use xp.where")


def test_gradient_outside_the_subset(close: Callable[..., None]) -> None:
    """A forward that fuses keeps fusing when its backward does not."""
    k = xpnn.kernel(lambda xp, x: x * x)

    @k.backward
    def k_backward(xp, dy, x):
        return xp.flip(xp.flip(dy, axis=-1), axis=-1) * 2 * x

    assert k.explain(X) == "numba"
    y, pullback = k.vjp(X)
    close(y, X * X)
    close(pullback(DY), 2 * X * DY)
