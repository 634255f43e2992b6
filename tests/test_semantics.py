"""What kernels do at the edges, and PyTorch's and SciPy's semantics. DESIGN section 5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import xpnn

INF, NAN = np.inf, np.nan
RNG = np.random.default_rng(7)


# --- against PyTorch and SciPy --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("kind", ["index", "probabilities"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropy_of_torch(
    backend: str, load_library: Any, reduction: str, kind: str, weighted: bool, smoothing: float, close: Callable[..., None]
) -> None:
    """Loss and gradients for a random cotangent; one row, rows, and two layouts of images; some rows ignored."""
    torch = load_library("torch").xp
    weight = RNG.uniform(0.2, 2.0, 6) if weighted else None
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    for shape in ((6,), (9, 6), (2, 6, 3), (2, 6, 3, 2)):
        axis = 1 if len(shape) > 1 else 0
        logits = RNG.normal(size=shape) * 3
        if kind == "index":
            target = RNG.integers(0, 6, shape[:axis] + shape[axis + 1 :])
            if target.ndim:
                target.flat[::4] = 2  # ignored, and the weight's class 2 nowhere else
            options["ignore_index"] = 2
        else:
            target = RNG.uniform(size=shape)
        theirs = torch.tensor(logits, requires_grad=True)
        goal = torch.tensor(target, requires_grad=kind == "probabilities")
        want = torch.nn.functional.cross_entropy(
            theirs, goal, weight=None if weight is None else torch.tensor(weight), **options
        )
        dloss = RNG.normal(size=tuple(want.shape))
        want.backward(torch.tensor(dloss))
        loss, pullback = xpnn.cross_entropy.vjp(logits, target, weight=weight, axis=axis, **options)
        close(loss, want.detach(), terms=np.abs(logits).max())
        dlogits, dtarget = pullback(dloss)[:2]
        close(dlogits, theirs.grad)
        if kind == "probabilities":
            close(dtarget, goal.grad)
        else:
            assert dtarget is None


@pytest.mark.parametrize("smoothing", [-0.1, NAN])
def test_smoothing_below_zero_is_none(backend: str, load_library: Any, smoothing: float) -> None:
    """PyTorch raises above one, and takes what is not above zero for zero."""
    torch, x, target = load_library("torch").xp, RNG.normal(size=(3, 4)), np.arange(3)
    want = torch.nn.functional.cross_entropy(torch.tensor(x), torch.tensor(target), label_smoothing=smoothing)
    assert xpnn.cross_entropy(x, target, label_smoothing=smoothing) == pytest.approx(float(want), rel=1e-14)


@pytest.mark.parametrize("name", ["sigmoid", "tanh", "relu"])
def test_activations_of_torch(backend: str, load_library: Any, name: str, close: Callable[..., None]) -> None:
    torch = load_library("torch").xp
    x = np.concatenate([RNG.normal(size=50) * 5, [0.0, -0.0, 1e-300, -1e-300, 30.0, -30.0, 800.0, -800.0]])
    dy = RNG.normal(size=x.size)
    theirs = torch.tensor(x, requires_grad=True)
    want = getattr(torch, name)(theirs)
    want.backward(torch.tensor(dy))
    y, pullback = getattr(xpnn, name).vjp(x)
    np.testing.assert_allclose(y, want.detach().numpy(), rtol=1e-14, atol=1e-300)
    close(pullback(dy), theirs.grad)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_normalizers_of_scipy(backend: str, axis: int, dtype: Any, close: Callable[..., None]) -> None:
    special = pytest.importorskip("scipy.special")
    x = (RNG.normal(size=(4, 5, 6)) * 4).astype(dtype)
    wide = x.astype(np.float64)
    close(xpnn.softmax(x, axis=axis), special.softmax(wide, axis), dtype=dtype)
    close(xpnn.log_softmax(x, axis=axis), special.log_softmax(wide, axis), dtype=dtype)
    close(xpnn.logsumexp(x, axis=axis), special.logsumexp(wide, axis), dtype=dtype)


# --- special values --------------------------------------------------------------------------------------------------------

ROWS = {
    "NaN": ([1.0, NAN, 2.0], [NAN] * 3, NAN),
    "all NaN": ([NAN] * 3, [NAN] * 3, NAN),
    "NaN beside +inf": ([INF, NAN, 2.0], [NAN] * 3, NAN),
    "NaN beside -inf": ([-INF, NAN, -INF], [NAN] * 3, NAN),
    "+inf": ([1.0, INF, 2.0], [NAN] * 3, INF),
    "two +inf": ([INF, INF, 2.0], [NAN] * 3, INF),
    "both inf": ([INF, -INF, 0.0], [NAN] * 3, INF),
    "all -inf": ([-INF] * 3, [NAN] * 3, -INF),
    "mask": ([0.0, -INF, 0.0], [0.5, 0.0, 0.5], np.log(2)),
    "all masked but one": ([-INF, 3.0, -INF], [0.0, 1.0, 0.0], 3.0),
    "1e4": ([1e4, -1e4, 1e4], [0.5, 0.0, 0.5], 1e4 + np.log(2)),
    "all -1e4": ([-1e4] * 3, [1 / 3] * 3, -1e4 + np.log(3)),
    "largest": ([3e38, -3e38, 3e38], [0.5, 0.0, 0.5], 3e38),
    "zeros": ([0.0, -0.0, 0.0], [1 / 3] * 3, np.log(3)),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("width", [3, 24, 300])
def test_special_rows(backend: str, name: str, dtype: Any, width: int, close: Callable[..., None]) -> None:
    """A special row between ordinary ones; wider ones are padded by a mask, which changes nothing."""
    row, want, total = ROWS[name]
    x = RNG.normal(size=(3, width)).astype(dtype)
    x[1] = -INF
    places = np.array([0, width // 2, width - 1])
    x[1, places] = row
    y, log_y, lse = xpnn.softmax(x), xpnn.log_softmax(x), xpnn.logsumexp(x)
    close(y[1, places], np.array(want))
    assert np.isnan(want[0]) or not np.delete(y[1], places).any(), "a mask gives exact zeros"
    given = np.array(row, dtype)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        rest = (given - given.max()).astype(np.float64) - np.log(np.count_nonzero(want))
        logs = np.where(np.equal(want, 0), rest, np.log(want))
    close(log_y[1, places], logs)
    np.testing.assert_allclose(lse[1], total, rtol=1e-6 if dtype == np.float32 else 1e-14)
    for k in (xpnn.softmax, xpnn.log_softmax, xpnn.logsumexp):  # the neighbours do not notice
        np.testing.assert_array_equal(k(x)[::2], k(x[::2].copy()))


def test_masked_entries_have_no_gradient(backend: str) -> None:
    x = np.array([[1.0, -INF, 2.0, -INF]])
    dy = RNG.normal(size=(1, 4))
    dx = xpnn.softmax.vjp(x)[1](dy)
    assert np.isfinite(dx).all()
    np.testing.assert_array_equal(dx[0, 1::2], [0, 0])
    assert dx[0, 0] != 0
    np.testing.assert_array_equal(xpnn.logsumexp.vjp(x)[1](np.ones(1))[0, 1::2], [0, 0])
    loss, g = xpnn.cross_entropy.value_and_grad(x, np.array([2]))
    assert loss == pytest.approx(np.log1p(np.exp(-1)), rel=1e-14)
    np.testing.assert_array_equal(g[0, 1::2], [0, 0])
    assert xpnn.cross_entropy(x, np.array([1])) == INF


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_logits_keep_their_digits(backend: str, dtype: Any) -> None:
    """Why (m, s) are saved and not m + log s, which near 1e4 would round log s away."""
    x = (RNG.normal(size=(50, 40)) + 1e4).astype(dtype)
    target = RNG.integers(0, 40, 50)
    wide = x.astype(np.longdouble)
    e = np.exp(wide - wide.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    p = p.astype(np.float64)
    losses = -np.log(p[np.arange(50), target])
    tolerance = 30 * np.finfo(dtype).eps
    np.testing.assert_allclose(xpnn.cross_entropy(x, target, reduction="none"), losses, rtol=tolerance, atol=tolerance)
    g = xpnn.cross_entropy.value_and_grad(x, target, reduction="sum")[1]
    np.testing.assert_allclose(g, p - np.eye(40)[target], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(xpnn.log_softmax(x), np.log(p), rtol=tolerance, atol=0)
    dx = xpnn.logsumexp.vjp(x)[1](np.ones(50, dtype))
    np.testing.assert_allclose(dx, p, rtol=tolerance, atol=0)


def test_activations_at_the_edges(backend: str) -> None:
    x = np.array([NAN, INF, -INF, 0.0, -0.0])
    np.testing.assert_array_equal(xpnn.sigmoid(x), [NAN, 1, 0, 0.5, 0.5])
    np.testing.assert_array_equal(xpnn.tanh(x), [NAN, 1, -1, 0, 0])
    np.testing.assert_array_equal(xpnn.relu(x), [NAN, INF, 0, 0, 0])
    np.testing.assert_array_equal(xpnn.log([NAN, INF, -INF, 0.0, -0.0, -1.0]), [NAN, INF, NAN, -INF, -INF, NAN])
    ones = np.ones(5)
    np.testing.assert_array_equal(xpnn.sigmoid.backward(ones, x=x), [NAN, 0, 0, 0.25, 0.25])
    np.testing.assert_array_equal(xpnn.tanh.backward(ones, x=x), [NAN, 0, 0, 1, 1])
    np.testing.assert_array_equal(xpnn.relu.backward(ones, x=x)[1:], [1, 0, 0, 0])
    np.testing.assert_array_equal(xpnn.relu.backward(np.full(5, NAN), x=x)[1:], [NAN, 0, 0, 0])


def test_sigmoid_keeps_its_tails(backend: str) -> None:
    """The same relative accuracy at −30 and −700 as at 0."""
    x = np.array([-700.0, -300.0, -40.0, -30.0, -1.0])
    np.testing.assert_allclose(xpnn.sigmoid(x), np.exp(x) / (1 + np.exp(x)), rtol=1e-14)
    np.testing.assert_array_equal(xpnn.sigmoid([40.0, 1e4, -1e4, -1e300, 1e300]), [1, 1, 0, 0, 1])
    small = xpnn.sigmoid(np.array([-80.0, -20.0, 20.0, 1e4, -1e4], np.float32))
    np.testing.assert_allclose(small, [1.8048513e-35, 2.0611537e-09, 1, 1, 0], rtol=5e-7)


# --- targets that do not count ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("ignored", [-100, -1, 2, 1000])
def test_ignored_rows_count_nothing(
    backend: str, ignored: int, weighted: bool, smoothing: float, close: Callable[..., None]
) -> None:
    """Loss 0 and gradient exactly 0 even of NaN logits; the rest as if the rows were not there."""
    x = RNG.normal(size=(6, 5))
    target = np.array([0, 1, ignored, 3, ignored, 4])
    rows = target != ignored
    x[2], x[4] = NAN, [INF, -INF, 0, 1, 2]
    weight = RNG.uniform(0.5, 2, 5) if weighted else None
    for reduction in ("none", "mean", "sum"):
        options: dict[str, Any] = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
        loss, pullback = xpnn.cross_entropy.vjp(x, target, ignore_index=ignored, **options)
        want, want_pullback = xpnn.cross_entropy.vjp(x[rows], target[rows], **options)
        dloss = RNG.normal(size=np.shape(loss))
        dx = pullback(dloss)[0]
        np.testing.assert_array_equal(dx[~rows], np.zeros((2, 5)))
        close(dx[rows], want_pullback(dloss[rows] if dloss.ndim else dloss)[0])
        if reduction == "none":
            np.testing.assert_array_equal(loss[~rows], [0, 0])
            loss = loss[rows]
        close(loss, want)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_all_rows_ignored(backend: str, smoothing: float) -> None:
    x, target = np.full((3, 4), NAN), np.full(3, -100)
    for reduction, want in (("mean", NAN), ("sum", 0.0)):
        loss, g = xpnn.cross_entropy.value_and_grad(x, target, reduction=reduction, label_smoothing=smoothing)
        np.testing.assert_array_equal(loss, want)
        np.testing.assert_array_equal(g, np.zeros((3, 4)))
    np.testing.assert_array_equal(xpnn.cross_entropy(x, target, reduction="none"), np.zeros(3))


def test_a_nan_row_that_counts(backend: str) -> None:
    x = RNG.normal(size=(3, 4))
    x[1, 2] = NAN
    loss, g = xpnn.cross_entropy.value_and_grad(x, np.array([0, 1, 2]))
    assert np.isnan(loss)
    assert np.isnan(g[1]).all()
    assert np.isfinite(g[::2]).all()


def test_probabilities_need_not_sum_to_one(backend: str, close: Callable[..., None]) -> None:
    x, t = RNG.normal(size=(4, 5)), RNG.uniform(size=(4, 5))
    t[0] = 0
    p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    loss, g = xpnn.cross_entropy.value_and_grad(x, t, reduction="sum")
    close(loss, -(t * np.log(p)).sum())
    close(g, p * t.sum(-1, keepdims=True) - t)
    assert not g[0].any()


def test_zero_weights(backend: str) -> None:
    """The mean over rows of no weight at all is 0/0, as PyTorch's."""
    x = RNG.normal(size=(2, 3))
    assert np.isnan(xpnn.cross_entropy(x, np.array([1, 1]), weight=np.array([1.0, 0.0, 1.0])))
    assert xpnn.cross_entropy(x, np.array([1, 1]), weight=np.array([1.0, 0.0, 1.0]), reduction="sum") == 0


def test_probabilities_of_zero(backend: str) -> None:
    """Where the true distribution is zero nothing counts, whatever is predicted."""
    probs, target = np.array([0.0, 0.25, 0.75]), np.array([0.0, 1.0, 0.0])
    loss, pullback = xpnn.cross_entropy_probs.vjp(probs, target)
    assert loss == pytest.approx(np.log(4), rel=1e-14)
    dp, dt = pullback(2.0)
    np.testing.assert_allclose(dp, [0.0, -8.0, 0.0], rtol=1e-14)
    np.testing.assert_allclose(dt, [INF, 2 * np.log(4), -2 * np.log(0.75)], rtol=1e-14)


# --- JAX: unchecked targets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("bad", [5, -1, 10**9])
def test_out_of_range_on_jax(
    load_library: Any, bad: int, weighted: bool, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN loss and zero gradient for that row, without looking; an error where XPNN_CHECK=1 asks to look."""
    library = load_library("jax")
    x, target = library.array(RNG.normal(size=(3, 5))), library.array([1, bad, 4])
    weight = library.array(RNG.uniform(0.5, 2, 5)) if weighted else None
    loss, pullback = xpnn.cross_entropy.vjp(x, target, weight=weight, reduction="none", label_smoothing=smoothing)
    loss, g = library.numpy(loss), library.numpy(pullback(library.array([1.0, 2.0, 3.0]))[0])
    assert np.isnan(loss).tolist() == [False, True, False]
    np.testing.assert_array_equal(g[1], np.zeros(5))
    assert (np.abs(g[::2]).max(-1) > 1e-3).all()
    assert np.isnan(float(xpnn.cross_entropy(x, target, weight=weight, label_smoothing=smoothing)))
    monkeypatch.setenv("XPNN_CHECK", "1")
    with pytest.raises(IndexError, match=rf"target\[1\]: got {bad}, expected 0 <= target < 5"):
        xpnn.cross_entropy(x, target, weight=weight, reduction="none", label_smoothing=smoothing)
