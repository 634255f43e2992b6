"""The short way of a second call, with options by name and several results in place: the same results, the same errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import xpnn
from xpnn.backends import call
from xpnn.samples import place

RNG = np.random.default_rng(10)


@pytest.fixture(autouse=True)
def _fused() -> Iterator[None]:
    with xpnn.use_backend("numba"):
        yield


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls a kernel, which must not go the long way."""

    def run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(call, "forward", lambda *_: pytest.fail("the long way"))
            return kernel(*args, **kwargs)

    return run


def check_scale(kinds: Any, shapes: Any, options: dict[str, Any]) -> None:
    if not options["scale"] >= 0:
        raise ValueError(f"both: scale: got {options['scale']}, expected scale >= 0")
    options["shift"] = min(options["shift"], 100.0)


@xpnn.kernel(outputs=("total", "difference"), check=check_scale, off={"shift": 0.0})
def both(xp, x, y, *, scale=0.5, shape=1, shift=0.0, flip=False, a0="plus"):
    """Options of all sorts, some called as the short way's own variables might be."""
    difference = (1 - scale) * (y - x if flip else x - y)
    total = x + y if a0 == "plus" else x * y
    return (total + shift if shift else total) + shape, difference


def expected(
    x: Any, y: Any, scale: float = 0.5, shape: int = 1, shift: float = 0.0, flip: bool = False, a0: str = "plus"
) -> Any:
    return (x + y if a0 == "plus" else x * y) + min(shift, 100.0) + shape, (1 - scale) * (y - x if flip else x - y)


def arrays(shape: tuple[int, ...] = (3, 40), dtype: Any = np.float64) -> list[np.ndarray]:
    return [RNG.normal(size=shape).astype(dtype) for _ in range(2)]


def agree(found: Any, want: Any) -> None:
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13)


SHORT = [
    ({"scale": 0.25}, {"scale": 0.75}),
    ({"shape": 3}, {"shape": -(2**40)}),
    ({"shift": 2.0, "scale": 0.1}, {"shift": 3.0, "scale": 0.2}),
    ({"flip": True, "scale": 0.1}, {"flip": True, "scale": 0.3}),
    ({"a0": "times"}, {"a0": "times"}),
    ({"flip": False, "a0": "times", "shift": 0.0}, {"flip": False, "a0": "times", "shift": 0.0}),
]


@pytest.mark.parametrize("shape", [(3, 40), (120,), (2, 3, 5)])
@pytest.mark.parametrize(("first", "second"), SHORT, ids=lambda o: "-".join(o))
def test_options(short: Any, first: dict[str, Any], second: dict[str, Any], shape: tuple[int, ...]) -> None:
    """The second call of such options is short, whatever its run-time numbers and the arrays' sizes."""
    x, y = arrays(shape)
    agree(both(x, y, **first), expected(x, y, **first))
    agree(short(both, x, y, **second), expected(x, y, **second))
    out = np.empty_like(x), np.empty_like(x)
    both(x, y, **first, out=out)
    found = short(both, x, y, **second, out=out)
    assert found[0] is out[0]
    assert found[1] is out[1]
    agree(out, expected(x, y, **second))


LONG: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"scale": 0.25}, {"scale": 1}),  # to be converted
    ({"scale": 0.25}, {"scale": np.float32(0.5)}),
    ({"shape": 3}, {"shape": np.int8(4)}),
    ({"shift": 2.0}, {"shift": 0.0}),  # off
    ({"shift": 2.0}, {"shift": 200.0}),  # replaced
    ({"shift": 200.0}, {"shift": 2.0}),
    ({"shift": 0.0}, {"shift": 2.0}),
    ({"flip": True}, {"flip": False}),
    ({"a0": "times"}, {"a0": "plus"}),
    ({"scale": 0.25, "shape": 2}, {"shape": 2, "scale": 0.75}),  # in another order
]


@pytest.mark.parametrize(("first", "second"), LONG, ids=lambda o: "-".join(map(str, (*o, *o.values()))))
def test_other_options(first: dict[str, Any], second: dict[str, Any]) -> None:
    """What needs the long way goes it, and changes nothing for what does not."""
    x, y = arrays()
    for options in (first, second, first, second, second, first):
        agree(both(x, y, **options), expected(x, y, **options))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": -1.0}, ValueError, "both: scale: got -1.0, expected scale >= 0"),
        ({"scale": float("nan")}, ValueError, "both: scale: got nan, expected scale >= 0"),
        ({"scale": "a"}, TypeError, "both: scale: got 'a', expected a number"),
        ({"shape": 2**63}, ValueError, "both: shape: got 9223372036854775808, expected an integer of 64 bits"),
        ({"shape": 0.5}, TypeError, "both: shape: got 0.5, expected an integer"),
        ({"size": 3}, TypeError, "both: got an unexpected argument 'size'"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    x, y = arrays()
    good = {"scale": 0.5} if "scale" in options else {"shape": 2}
    for _ in range(2):
        agree(both(x, y, **good), expected(x, y, **good))
        with pytest.raises(error) as raised:
            both(x, y, **options)
        assert str(raised.value).startswith(message)


@pytest.mark.parametrize("shape", [(3, 40), (120,), (2, 3, 5)])
def test_several_results_in_place(short: Any, shape: tuple[int, ...]) -> None:
    """Over the inputs; some of them, or none, in memory of their own."""
    x, y = arrays(shape)
    want = expected(x, y)
    both(x, y)
    for first, second in ((True, True), (True, False), (False, True), (False, False)):
        a, b = x.copy(), y.copy()
        out = (a if first else None, b if second else None)
        found = short(both, a, b, out=out)
        agree(found, want)
        assert (found[0] is a) is first
        assert (found[1] is b) is second
    a, b = x.copy(), y.copy()
    short(both, a, b, out=(b, a))
    agree((b, a), want)


def bad_outs(x: np.ndarray, y: np.ndarray) -> dict[str, tuple[Any, type[Exception], str]]:
    overlapping = np.zeros(x.size + 4)
    halves = overlapping[: x.size].reshape(x.shape), overlapping[4:].reshape(x.shape)
    frozen = np.zeros_like(x)
    frozen.flags.writeable = False
    return {
        "one": (np.zeros_like(x), TypeError, "out: got 1 arrays, expected 2: total, difference"),
        "three": ((None, None, None), TypeError, "out: got 3 arrays, expected 2"),
        "twice": ((x, x), ValueError, "out[difference]: got memory that overlaps out[total]"),
        "fresh twice": ((halves[0], halves[0]), ValueError, "out[difference]: got memory that overlaps out[total]"),
        "overlapping": (halves, ValueError, "out[difference]: got memory that overlaps out[total]"),
        "dtype": ((None, np.zeros(x.shape, "f4")), TypeError, "out: got dtype float32, expected float64"),
        "shape": ((np.zeros((1, *x.shape)), None), ValueError, "out: got shape"),
        "read-only": ((frozen, y), ValueError, "out[total]: got a read-only array"),
    }


@pytest.mark.parametrize("shape", [(3, 40), (120,)])
@pytest.mark.parametrize("name", bad_outs(*arrays()))
def test_bad_outs(name: str, shape: tuple[int, ...]) -> None:
    """As without a short way; nothing was written."""
    x, y = arrays(shape)
    both(x, y, out=(np.empty_like(x), np.empty_like(x)))
    before = x.copy(), y.copy()
    out, error, message = bad_outs(x, y)[name]
    with pytest.raises(error) as raised:
        both(x, y, out=out)
    assert str(raised.value).startswith(f"both: {message}")
    np.testing.assert_array_equal((x, y), before)
    agree(both(x, y), expected(x, y))


def test_a_step_of_half_precision(short: Any) -> None:
    arrays = [np.abs(RNG.normal(size=300)).astype(t) for t in ("f2", "f2", "f4", "f4")]
    param, _, m, v = arrays
    want = xpnn.adamw(*arrays, step=3, lr=0.1)
    got = short(xpnn.adamw, *arrays, step=3, lr=0.1)
    xpnn.adamw(*(a.copy() for a in arrays), step=3, lr=0.1, out=(None, None, None))
    over = short(xpnn.adamw, *arrays, step=3, lr=0.1, out=(param, m, v))
    for a, b, c in zip(want, got, over, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    assert over[0] is param


def test_arrays_and_axes_by_name_go_the_long_way() -> None:
    x, y = arrays()
    for _ in range(2):
        agree(both(x, y=y, scale=0.25), expected(x, y, scale=0.25))
        np.testing.assert_allclose(xpnn.softmax(x, axis=0).sum(0), 1.0)
        np.testing.assert_allclose(xpnn.softmax(x, axis=1).sum(1), 1.0)


@xpnn.kernel(outputs=("loss",))
def product(xp, x, y):
    return xp.sum(x * y, axis=None)


@product.backward
def product_backward(xp, dloss, x, y):
    return dloss * y, dloss * x


@pytest.mark.parametrize("backend", ["numba", "cupy"])
def test_two_gradients(backend: str) -> None:
    """A value and a pair of gradients, the second time too."""
    pytest.importorskip({"cupy": "cupy"}.get(backend, "numpy"), reason="CuPy is not installed")
    x, y = arrays()
    with place(backend) as at:
        for _ in range(3):
            loss, (dx, dy) = product.value_and_grad(at.there(x), at.there(y))
            assert float(at.back(loss)) == pytest.approx(np.sum(x * y))
            np.testing.assert_array_equal(at.back(dx), y)
            np.testing.assert_array_equal(at.back(dy), x)
