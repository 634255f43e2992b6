"""Losses of many terms against torch.nn.functional in float64, and at the edges."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import xpnn

INF, NAN = np.inf, np.nan
TINY = np.finfo(np.float64).tiny  # what is smaller may be flushed
RNG = np.random.default_rng(11)
REDUCTIONS = ("none", "mean", "sum")
LOSSES: list[tuple[str, dict[str, Any]]] = [
    ("mse_loss", {}),
    ("huber_loss", {}),
    ("huber_loss", {"delta": 0.4}),
    ("smooth_l1_loss", {}),
    ("smooth_l1_loss", {"beta": 0.4}),
    ("smooth_l1_loss", {"beta": 0.0}),
    ("kl_div", {}),
    ("kl_div", {"log_target": True}),
    ("binary_cross_entropy_with_logits", {}),
]
NAMES = list(dict.fromkeys(name for name, _ in LOSSES))
SAME: list[tuple[int, ...]] = [(), (1,), (5,), (4, 3), (2, 3, 4), (3, 300), (40, 700)]
BROADCAST: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((2, 3), (3,)), ((3,), (2, 3)), ((2, 1, 4), (3, 1)), ((), (2, 2)), ((2, 3), ()), ((3, 3), (3,)),
]  # fmt: skip


@pytest.fixture(params=["numpy", "auto"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The formula composed, and fused as it is by default."""
    with xpnn.use_backend(request.param):
        yield request.param


def draw(name: str, options: dict[str, Any], shape: tuple[int, ...], target: tuple[int, ...]) -> dict[str, np.ndarray]:
    x, t = RNG.normal(size=shape) * 2, RNG.normal(size=target)
    if name == "binary_cross_entropy_with_logits" or (name == "kl_div" and not options.get("log_target")):
        t = RNG.uniform(0.05, 1, target)
    return {next(iter(getattr(xpnn, name).declaration.inputs)): x, "target": t}


def compare(torch: Any, name: str, arrays: dict[str, Any], options: dict[str, Any], close: Callable[..., None]) -> None:
    """Value, and gradients for a random cotangent, by torch and by us."""
    theirs = {n: torch.tensor(a, requires_grad=True) for n, a in arrays.items()}
    first, *others = theirs
    constant = {n for n in others if name.startswith("binary") and n != "target"}  # torch has no gradients for these
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Using a target size that is different to the input size"
        want = getattr(torch.nn.functional, name)(
            theirs[first], **{n: theirs[n].detach() if n in constant else theirs[n] for n in others}, **options
        )
    dloss = RNG.normal(size=tuple(want.shape))
    loss, pullback = getattr(xpnn, name).vjp(**arrays, **options)
    terms = max([1.0, *(np.abs(a).max() for a in arrays.values())])
    close(loss, want.detach(), terms=terms)
    if constant:  # an equal loss that has them
        t, x = theirs["target"], theirs[first]
        log = torch.nn.functional.logsigmoid
        each = -theirs.get("weight", 1.0) * (theirs.get("pos_weight", 1.0) * t * log(x) + (1 - t) * log(-x))
        want = {"none": lambda v: v, "mean": torch.mean, "sum": torch.sum}[options["reduction"]](each)
        close(loss, want.detach(), terms=terms)
    want.backward(torch.tensor(dloss))
    for tensor, gradient in zip(theirs.values(), pullback(dloss), strict=True):
        close(gradient, tensor.grad, terms=np.abs(dloss).max() / max(gradient.size, 1))
    if np.ndim(loss) == 0:
        value, gradients = getattr(xpnn, name).value_and_grad(**arrays, **options, wrt=tuple(arrays))
        close(value, loss, terms=terms)
        for ours, gradient in zip(gradients, pullback(1.0), strict=True):
            close(ours, gradient)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("name", "options"), LOSSES)
def test_torch(backend: str, load_library: Any, name: str, options: dict[str, Any], reduction: str, close: Any) -> None:
    torch = load_library("torch").xp
    shapes = [(s, s) for s in SAME] + ([] if name.startswith("binary") else BROADCAST)
    for shape, target in shapes:
        compare(torch, name, draw(name, options, shape, target), {**options, "reduction": reduction}, close)


@pytest.mark.parametrize("log_target", [False, True])
def test_batchmean(backend: str, load_library: Any, log_target: bool, close: Any) -> None:
    """Over the length of x's first axis, whatever the other axes are."""
    torch, options = load_library("torch").xp, {"log_target": log_target}
    for shape, target in [
        *((s, s) for s in (*SAME, (5, 1), (1, 5))),
        ((2, 3), (3,)),
        ((1, 3), (2, 3)),
        ((), (2, 2)),
        ((3,), (3, 3)),
    ]:
        compare(torch, "kl_div", draw("kl_div", options, shape, target), {**options, "reduction": "batchmean"}, close)
    with pytest.raises(ValueError, match=r"kl_div: x: got shape \(3,\), expected target's \(2, 3\)"):
        xpnn.kl_div(np.ones(3), np.ones((2, 3)), reduction="batchmean")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["mse_loss", "huber_loss"])
def test_weights(backend: str, load_library: Any, name: str, reduction: str, close: Any) -> None:
    """A weighted mean divides by the weights' sum in mse_loss, by the number of terms in huber_loss."""
    torch = load_library("torch").xp
    for shape, target in [*((s, s) for s in SAME), ((2, 3), (3,)), ((2, 3), ())]:
        arrays = draw(name, {}, shape, target) | {"weight": RNG.uniform(0.2, 2, shape)}
        compare(torch, name, arrays, {"reduction": reduction}, close)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weight", [None, (), (3,), (4, 1), (4, 3)])
@pytest.mark.parametrize("pos_weight", [None, (3,), (4, 3)])
def test_binary_weights(backend: str, load_library: Any, weight: Any, pos_weight: Any, reduction: str, close: Any) -> None:
    torch, name = load_library("torch").xp, "binary_cross_entropy_with_logits"
    arrays = draw(name, {}, (4, 3), (4, 3))
    arrays |= {n: RNG.uniform(0.2, 2, s) for n, s in (("weight", weight), ("pos_weight", pos_weight)) if s is not None}
    compare(torch, name, arrays, {"reduction": reduction}, close)


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nll_of_torch(backend: str, load_library: Any, reduction: str, weighted: bool, close: Any) -> None:
    torch = load_library("torch").xp
    weight = RNG.uniform(0.2, 2.0, 6) if weighted else None
    for shape in ((6,), (9, 6), (2, 6, 3), (2, 6, 3, 2)):
        axis = 1 if len(shape) > 1 else 0
        x, target = RNG.normal(size=shape), RNG.integers(0, 6, shape[:axis] + shape[axis + 1 :])
        if target.ndim:
            target.flat[::4] = 2  # ignored, and the weight's class 2 nowhere else
        options: dict[str, Any] = {"reduction": reduction, "ignore_index": 2 if target.ndim else -100}
        theirs = torch.tensor(x, requires_grad=True)
        w = None if weight is None else torch.tensor(weight)
        want = torch.nn.functional.nll_loss(theirs, torch.tensor(target), weight=w, **options)
        dloss = RNG.normal(size=tuple(want.shape))
        want.backward(torch.tensor(dloss))
        loss, pullback = xpnn.nll_loss.vjp(x, target, weight=weight, axis=axis, **options)
        close(loss, want.detach(), terms=np.abs(x).max())
        dx, *none = pullback(dloss)
        close(dx, theirs.grad)
        assert set(none) == {None}


def test_nll_of_log_softmax_is_cross_entropy(backend: str, close: Any) -> None:
    logits, target = RNG.normal(size=(8, 5)), RNG.integers(0, 5, 8)
    y, through = xpnn.log_softmax.vjp(logits)
    loss, dy = xpnn.nll_loss.value_and_grad(y, target)
    want, dlogits = xpnn.cross_entropy.value_and_grad(logits, target)
    close(loss, want)
    close(through(dy), dlogits)


# --- the edges --------------------------------------------------------------------------------------------------------


def test_nll_rows_that_do_not_count(backend: str) -> None:
    x = np.array([[NAN, -1.0], [-2.0, NAN], [-3.0, -0.5]])
    loss, dx = xpnn.nll_loss.value_and_grad(x, np.array([1, -100, 0]), reduction="sum")
    assert loss == 4.0
    np.testing.assert_array_equal(dx, [[0, -1], [0, 0], [-1, 0]])
    loss, dx = xpnn.nll_loss.value_and_grad(x, np.full(3, -100))
    assert np.isnan(loss)
    np.testing.assert_array_equal(dx, np.zeros((3, 2)))
    assert xpnn.nll_loss(x, np.full(3, -100), reduction="sum") == 0
    with pytest.raises(IndexError, match=r"nll_loss: target\[1\]: got 2, expected 0 <= target < 2"):
        xpnn.nll_loss(x, np.array([0, 2, 0]))


@pytest.mark.parametrize("name", NAMES)
def test_nothing(backend: str, name: str) -> None:
    """The mean of nothing is NaN, its sum 0, its gradients empty."""
    k = getattr(xpnn, name)
    for shape in ((0,), (0, 3), (3, 0)):
        x = np.ones(shape)
        for reduction, want in (("mean", NAN), ("sum", 0.0), ("none", x)):
            loss, pullback = k.vjp(x, x.copy(), reduction=reduction)
            np.testing.assert_array_equal(loss, want)
            assert [g.shape for g in pullback(loss)[:2]] == [shape, shape]
    for shape, total in (((0,), NAN), ((0, 3), NAN), ((3, 0), 0.0)):
        np.testing.assert_array_equal(xpnn.kl_div(np.ones(shape), np.ones(shape), reduction="batchmean"), total)


@pytest.mark.parametrize(("name", "options"), LOSSES)
def test_nan_stays(backend: str, name: str, options: dict[str, Any]) -> None:
    """In x: NaN in its term and in its gradient alone, and in every sum."""
    k, (x, t) = getattr(xpnn, name), draw(name, options, (5, 7), (5, 7)).values()
    x[2, 3] = NAN
    loss, pullback = k.vjp(x, t, **options, reduction="none")
    at = np.isnan(x)
    np.testing.assert_array_equal(np.isnan(loss), at)
    dx, dt = pullback(np.ones((5, 7)))
    np.testing.assert_array_equal(np.isnan(dt), at)
    if name != "kl_div":  # whose slope along x is −t
        np.testing.assert_array_equal(np.isnan(dx), at)
    assert np.isnan(k(x, t, **options))


def test_binary_cross_entropy_keeps_its_tails(backend: str) -> None:
    """The same relative accuracy at 700 as at 0, of the loss and of its gradient."""
    x = np.array([-700.0, -40.0, -1.0, 0.0, 1.0, 40.0, 700.0])
    wide = x.astype(np.longdouble)
    for sign, t in ((-1, 1.0), (1, 0.0)):
        loss, pullback = xpnn.binary_cross_entropy_with_logits.vjp(x, np.full(7, t), reduction="none")
        np.testing.assert_allclose(loss, np.logaddexp(0, sign * wide).astype(float), rtol=1e-15)
        slope = sign / (1 + np.exp(-sign * wide))
        np.testing.assert_allclose(pullback(np.ones(7))[0], slope.astype(float), rtol=1e-15)
    far = np.array([1e4, -1e4, 1e300, -1e300])
    loss, pullback = xpnn.binary_cross_entropy_with_logits.vjp(far, np.array([1.0, 0.0, 1.0, 0.0]), reduction="none")
    np.testing.assert_array_equal(loss, np.zeros(4))
    np.testing.assert_array_equal(pullback(np.ones(4))[0], np.zeros(4))
    loss, pullback = xpnn.binary_cross_entropy_with_logits.vjp(far, np.array([0.0, 1.0, 0.0, 1.0]), reduction="none")
    np.testing.assert_array_equal(loss, np.abs(far))
    np.testing.assert_array_equal(pullback(np.ones(4))[0], np.sign(far))


def test_divergence_where_the_target_is_zero(backend: str) -> None:
    """The term is 0 whatever is predicted, also for a target given as a logarithm."""
    x = np.array([0.0, -INF, NAN, INF, -1.0])
    np.testing.assert_array_equal(xpnn.kl_div(x, np.zeros(5), reduction="none"), np.zeros(5))
    assert xpnn.kl_div(x, np.zeros(5)) == 0
    loss, pullback = xpnn.kl_div.vjp(x, np.full(5, -INF), reduction="none", log_target=True)
    np.testing.assert_array_equal(loss, np.zeros(5))
    np.testing.assert_array_equal(pullback(np.ones(5)), np.zeros((2, 5)))
    assert xpnn.kl_div(np.array([-INF]), np.ones(1)) == INF
    np.testing.assert_array_equal(xpnn.kl_div.vjp(x[:1], np.zeros(1))[1](1.0), [[0.0], [-INF]])


def test_ties(backend: str) -> None:
    """Where the parabola meets its tangent both agree; at its own corner L1 has slope 0."""
    z, zero = np.array([0.5, -0.5, 0.0, NAN, INF, -INF]), np.zeros(6)
    loss, pullback = xpnn.huber_loss.vjp(z, zero, delta=0.5, reduction="none")
    np.testing.assert_array_equal(loss, [0.125, 0.125, 0, NAN, INF, INF])
    np.testing.assert_array_equal(pullback(np.ones(6))[0], [0.5, -0.5, 0, NAN, 0.5, -0.5])
    loss, pullback = xpnn.smooth_l1_loss.vjp(z, zero, beta=0.5, reduction="none")
    np.testing.assert_array_equal(loss, [0.25, 0.25, 0, NAN, INF, INF])
    np.testing.assert_array_equal(pullback(np.ones(6))[0], [1, -1, 0, NAN, 1, -1])
    loss, pullback = xpnn.smooth_l1_loss.vjp(z, zero, beta=0.0, reduction="none")
    np.testing.assert_array_equal(loss, [0.5, 0.5, 0, NAN, INF, INF])
    np.testing.assert_array_equal(pullback(np.ones(6)), [[1, -1, 0, NAN, 1, -1], [-1, 1, 0, NAN, -1, 1]])


NUMBERS = st.sampled_from([0.0, -0.0, 0.3, -0.3, 1.0, -1.0, 1e4, -1e4, 1e-300, INF, -INF, NAN]) | st.floats(-1e4, 1e4)
SHARES = st.sampled_from([0.0, 1.0, 0.5, 1e-300]) | st.floats(0, 1)
ROWS = st.integers(1, 40).flatmap(
    lambda n: st.tuples(*(st.lists(s, min_size=n, max_size=n) for s in (NUMBERS, NUMBERS, SHARES)))
)


def piecewise(z: Any, width: float) -> Any:
    """Huber's loss and its slope."""
    inside = np.abs(z) < width
    return np.where(inside, z * z / 2, width * (np.abs(z) - width / 2)), np.where(inside, z, width * np.sign(z))


@settings(deadline=None, max_examples=100)
@given(rows=ROWS)
def test_any_numbers(rows: Any) -> None:
    """Terms and slopes against formulas written out in long double, to a few roundings of their largest term."""
    x, t, share = map(np.array, rows)
    wide, p = x.astype(np.longdouble), share.astype(np.longdouble)
    with np.errstate(all="ignore"):
        z = (x - t).astype(np.longdouble)
        e = np.exp(-np.abs(wide))
        sigmoid = np.where(wide >= 0, 1, e) / (1 + e)
        zero = p == 0
        beside = np.nan_to_num(1 + np.abs(p * wide), posinf=0.0)  # what a slope or a divergence is a difference of
        expected = {
            ("mse_loss", ()): (z * z, 2 * z),
            ("huber_loss", (("delta", 0.3),)): piecewise(z, 0.3),
            ("smooth_l1_loss", (("beta", 0.3),)): tuple(v / np.longdouble(0.3) for v in piecewise(z, 0.3)),
            ("smooth_l1_loss", (("beta", 0.0),)): (np.abs(z), np.sign(z)),
            ("binary_cross_entropy_with_logits", ()): (
                np.maximum(wide, 0) * (1 - p) + np.maximum(-wide, 0) * p + np.log1p(e), sigmoid - p,
            ),
            ("kl_div", ()): (np.where(zero, 0, p * (np.log(np.where(zero, 1, p)) - wide)), -p),
        }  # fmt: skip
        for (name, options), (terms, slopes) in expected.items():
            other = share if name in ("kl_div", "binary_cross_entropy_with_logits") else t
            loss, pullback = getattr(xpnn, name).vjp(x, other, reduction="none", **dict(options))
            slope = pullback(np.ones(x.size))[0]
            for ours, truth in ((loss, terms), (slope, slopes)):
                size = np.abs(truth) + (beside if ours is slope or name == "kl_div" else 0)
                same = (ours == truth) | (np.isnan(ours) & np.isnan(truth)) | (np.abs(ours - truth) <= 1e-15 * size + TINY)
                assert same.all(), (name, x[~same], other[~same], ours[~same], truth[~same])


# --- as kernels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_no_axis(name: str) -> None:
    k = getattr(xpnn, name)
    assert not k.has_axis
    assert "axis" not in inspect.signature(k).parameters
    with pytest.raises(TypeError, match=f"{name}: got an unexpected argument 'axis'"):
        k(np.ones((2, 2)), np.ones((2, 2)), axis=0)
    assert xpnn.nll_loss.has_axis
    assert xpnn.cross_entropy.has_axis


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(("name", "options"), LOSSES)
def test_dtypes(backend: str, name: str, options: dict[str, Any], dtype: Any, close: Any) -> None:
    """A loss of half precision is single; gradients have the input's dtype. Integer targets have no gradient."""
    k, (x, t) = getattr(xpnn, name), (a.astype(dtype) for a in draw(name, options, (6, 50), (6, 50)).values())
    for reduction in REDUCTIONS:
        loss, pullback = k.vjp(x, t, **options, reduction=reduction)
        want, wanted = k.vjp(x.astype(float), t.astype(float), **options, reduction=reduction)
        close(loss, want, dtype=np.float32, terms=1.0)
        gradients = pullback(np.ones_like(loss))
        for ours, exact in zip(gradients, wanted(np.ones_like(want)), strict=True):
            close(ours, exact, dtype=dtype)
    dx, none = k.vjp(x, np.ones(x.shape, np.int64), **options)[1](1.0)
    assert dx.dtype == dtype
    assert none is None
    none, dt = k.vjp(np.ones(x.shape, np.int64), t, **options)[1](1.0)
    assert none is None
    close(dt, k.vjp(np.ones(x.shape, dtype), t, **options)[1](1.0)[1], dtype=dtype)


@pytest.mark.parametrize(("name", "options"), LOSSES)
def test_one_sum_for_all_shapes(backend: str, name: str, options: dict[str, Any]) -> None:
    """The sum depends on the elements and their number alone, bit for bit: not on shape, strides, or the way taken."""
    k, (x, t) = getattr(xpnn, name), (a.astype(np.float32) for a in draw(name, options, (60, 700), (60, 700)).values())
    want = k(x, t, **options)
    for _ in range(3):  # by then the short way is taken
        assert k(x, t, **options) == want
    assert k(x.ravel(), t.reshape(6, 10, 700)[:, :, :].ravel(), **options) == want
    assert k(x.reshape(700, 60), t.reshape(700, 60), **options) == want
    wide = np.zeros((60, 1400), np.float32)
    wide[:, ::2] = x
    assert k(wide[:, ::2], np.asfortranarray(t), **options) == want


def test_out(backend: str, close: Any) -> None:
    """Gradients over the predictions, terms into a given array; and only of the right kind."""
    x, t = RNG.normal(size=(2, 4, 5))
    loss, dx = xpnn.mse_loss.value_and_grad(x, t)
    given_x = x.copy()
    again, written = xpnn.mse_loss.value_and_grad(given_x, t, out=given_x)
    assert again == loss
    assert written is given_x
    close(given_x, dx)
    terms = np.empty((4, 5))
    assert xpnn.mse_loss(x, t, reduction="none", out=terms) is terms
    close(terms, (x - t) ** 2)
    total = np.empty(())
    assert xpnn.mse_loss(x, t, out=total) is total
    assert total == loss
    with pytest.raises(ValueError, match=r"mse_loss: out: got shape \(4, 5\), expected \(\)"):
        xpnn.mse_loss(x, t, out=terms)
    with pytest.raises(ValueError, match=r"mse_loss.value_and_grad: the result: got more than one number"):
        xpnn.mse_loss.value_and_grad(x, t, reduction="none")


def test_backward_alone(backend: str, close: Any) -> None:
    x, t, w = RNG.uniform(0.1, 2, size=(3, 4, 5))
    for name, extra in (("mse_loss", (w,)), ("huber_loss", (w,)), ("smooth_l1_loss", ()), ("kl_div", ())):
        k = getattr(xpnn, name)
        want = k.vjp(x, t, *extra)[1](0.7)
        for ours, gradient in zip(k.backward(0.7, x, t, *extra), want, strict=True):
            close(ours, gradient)
    with pytest.raises(ValueError, match=r"mse_loss.backward: dloss: got shape \(2,\), expected one number"):
        xpnn.mse_loss.backward(np.ones(2), x, t)


ONES = np.ones((2, 3))
BAD: list[tuple[str, dict[str, Any], str]] = [
    *((n, {"reduction": "avg"}, "reduction: got 'avg', expected 'none', 'mean'") for n in NAMES),
    ("mse_loss", {"reduction": "batchmean"}, "reduction: got 'batchmean', expected 'none', 'mean' or 'sum'"),
    ("kl_div", {"reduction": ""}, "reduction: got '', expected 'none', 'mean', 'sum' or 'batchmean'"),
    *(("huber_loss", {"delta": d}, f"delta: got {d}, expected a number above zero") for d in (0.0, -1.0, NAN)),
    *(("smooth_l1_loss", {"beta": b}, f"beta: got {b}, expected zero or a number above") for b in (-1.0, NAN)),
    ("mse_loss", {"weight": np.ones(3)}, r"weight: got shape \(3,\), expected x's \(2, 3\)"),
    ("huber_loss", {"weight": np.ones(3)}, r"weight: got shape \(3,\), expected x's \(2, 3\)"),
    ("mse_loss", {"weight": ONES, "target": np.ones((2, 2, 3))}, r"target: got shape \(2, 2, 3\), expected one that"),
    ("binary_cross_entropy_with_logits", {"target": np.ones(3)}, r"target: got shape \(3,\), expected logits' \(2, 3\)"),
    ("binary_cross_entropy_with_logits", {"weight": np.ones((2, 2, 3))}, r"weight: got shape \(2, 2, 3\), expected one that"),
    ("binary_cross_entropy_with_logits", {"pos_weight": np.ones(2)}, r"pos_weight: got shape \(2,\), expected one that"),
    ("mse_loss", {"target": np.ones((2, 2))}, r"target: got shape \(2, 2\), expected one that fits x's \(2, 3\)"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), BAD)
def test_bad_arguments(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        getattr(xpnn, name)(ONES, **({"target": ONES} | arguments))
    with pytest.raises(ValueError, match=r"^nll_loss: reduction: got 'avg', expected 'none', 'mean' or 'sum'"):
        xpnn.nll_loss(ONES, np.array([0, 1]), reduction="avg")
