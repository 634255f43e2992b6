"""Emitted CUDA kernels, run on the CPU: right on both sides of every regime's borders, and on whatever callers pass."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import ORACLES

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")

from cuda_helpers import A100, MANY, back, on_host  # noqa: E402

import xpnn  # noqa: E402
from xpnn.backends import choice  # noqa: E402
from xpnn.backends.arrays import numpy_dtype  # noqa: E402
from xpnn.backends.cupy import host  # noqa: E402
from xpnn.backends.cupy.regime import Device  # noqa: E402
from xpnn.backends.kernel import Kernel  # noqa: E402
from xpnn.testing import _compute, given_for_backward, sample, truth_of, variants  # noqa: E402

pytestmark = pytest.mark.skipif(host.compiler() is None, reason="there is no C++ compiler to run CUDA kernels on the CPU")

Record = Callable[[str, object], None]


# regime, device, columns on both sides of its borders
BORDERS = [
    ("thread", MANY, "float32", (1, 3, 4, 31)),
    ("warp", MANY, "float32", (8, 33, 127, 128, 129, 1023, 1024)),
    ("block", MANY, "float32", (1025, 1028, 4096, 16381, 16384)),
    ("cluster", MANY, "float32", (16385, 131072)),
    ("cluster", MANY, "float32", (131076,)),
    ("shared", A100, "float32", (16388, 16389)),
    ("passes", A100, "float32", (60_004, 60_001)),
    ("split", Device(), "float32", (16388, 40_001)),
    ("warp", MANY, "bfloat16", (16, 33, 1024)),
    ("block", MANY, "bfloat16", (1025, 16384)),
    ("cluster", MANY, "bfloat16", (50_257,)),
    ("split", Device(), "bfloat16", (50_257,)),
    ("thread", MANY, "float16", (15,)),
    ("block", MANY, "float16", (5000,)),
    ("warp", MANY, "float64", (511,)),
    ("block", MANY, "float64", (513, 8192)),
    ("cluster", MANY, "float64", (8193,)),
    ("passes", A100, "float64", (70_000,)),
]


@pytest.mark.parametrize(("name", "device", "dtype", "widths"), BORDERS, ids=lambda v: v if isinstance(v, str) else None)
@pytest.mark.parametrize(
    ("kernel", "direction"),
    [(xpnn.softmax, "forward"), (xpnn.softmax, "backward"), (xpnn.cross_entropy, "value_and_grad")],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_borders(
    kernel: Kernel,
    direction: str,
    name: str,
    device: Device,
    dtype: str,
    widths: tuple[int, ...],
    record_property: Record,
) -> None:
    """As exact as the composed formula, in the regime that was meant."""
    variant = next(iter(variants(kernel)))
    for columns in widths if direction == "forward" else widths[-1:]:
        for rows in (1, 3) if columns < 5000 else (2,):
            arrays = sample(kernel, variant, (rows, columns), dtype, columns % 2)
            if direction == "backward":
                arrays = given_for_backward(kernel, arrays, {}, 1)
            truth = truth_of(kernel, direction, arrays, {}, dtype)
            with host.running(host.Host(device)) as running:
                results = _compute(kernel, direction, arrays, {}, "cupy")
            used = set(running.launched) - {"values"}
            assert used <= {name, "shared", "passes"} if direction == "backward" else used == {name}, columns
            assert truth.excess(results)[2] <= 0, columns
            record_property("cuda executed", f"{kernel.__name__} {dtype} {name} host")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("columns", [10, 1000, 4100])
def test_special_rows(machine: host.Host, dtype: str, columns: int) -> None:
    """±inf, NaN, ±1e4: as NumPy has it, and one row never spoils another."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((7, columns))
    x[1, 3] = np.inf
    x[2, 4] = np.nan
    x[3] = -np.inf
    x[4, : columns // 2] = -np.inf
    x[5] += 1e4
    x[6] -= 1e4
    x = x.astype(numpy_dtype(dtype))
    target = np.arange(7) % columns
    for kernel in (xpnn.softmax, xpnn.log_softmax, xpnn.logsumexp):
        with choice.use_backend("numpy"):
            expected = np.asarray(kernel(x), np.float64)
        found = np.asarray(back(kernel(on_host(x))), np.float64)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
        tolerance = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 2e-6, "float64": 1e-14}[dtype]
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance / 10)
    loss = back(xpnn.cross_entropy(on_host(x), on_host(target), reduction="none"))
    assert loss.dtype == (np.float64 if dtype == "float64" else np.float32)
    assert list(np.isnan(loss)) == [False, True, True, True, False, False, False]
    y = back(xpnn.softmax(on_host(x)))
    assert (y[4, : columns // 2] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("columns", [10, 52, 1000, 5000])
def test_a_row_gives_the_same_bits_wherever_it_lies(dtype: str, columns: int) -> None:
    """Alone or among others, aligned or not, with gaps between rows, split or not, in whatever order warps run."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((5, columns)).astype(numpy_dtype(dtype))
    found = []
    for device, seed in ((MANY, 0), (Device(), 1), (MANY, 2), (A100, 3)):
        with host.running(host.Host(device, seed=seed)):
            rows = [back(xpnn.softmax(on_host(x[k : k + 1]))) for k in range(5)]
            room = cupy.empty(5 * columns + 1, numpy_dtype(dtype))
            off = room[1:].reshape(5, columns)
            host.as_numpy(off)[...] = x
            wide = cupy.empty((5, columns + 3), numpy_dtype(dtype))[:, 2 : columns + 2]
            host.as_numpy(wide)[...] = x
            into = cupy.empty((5, columns + 5), numpy_dtype(dtype))[:, 1 : columns + 1]
            found += [np.concatenate(rows), *(back(xpnn.softmax(a)) for a in (on_host(x), off, wide))]
            xpnn.softmax(wide, out=into)
            found.append(back(into))
    first = found[0].view(f"u{found[0].itemsize}")
    for other in found[1:]:
        np.testing.assert_array_equal(other.view(first.dtype), first)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 3000),
    offset=st.integers(0, 7),
    gap=st.integers(0, 9),
    dtype=st.sampled_from(["float16", "bfloat16", "float32", "float64"]),
    processors=st.sampled_from([1, 132]),
    seed=st.integers(0, 3),
)
def test_any_view(rows: int, columns: int, offset: int, gap: int, dtype: str, processors: int, seed: int) -> None:
    """softmax and its gradient of a view that starts anywhere, with any gap between its rows."""
    rng = np.random.default_rng(seed)
    x, dy = (rng.standard_normal((rows, columns)).astype(numpy_dtype(dtype)) for _ in range(2))
    with choice.use_backend("numpy"):
        wide = [a.astype(np.float64) for a in (x, dy)]
        y = xpnn.softmax(wide[0])
        expected = xpnn.softmax.backward(wide[1], y=y)
    with host.running(host.Host(Device(processors=processors), seed=seed)):
        views = [cupy.empty((rows, columns + gap + offset), numpy_dtype(dtype))[:, offset : offset + columns] for _ in range(2)]
        for view, values in zip(views, (x, dy), strict=True):
            host.as_numpy(view)[...] = values
        found, pullback = xpnn.softmax.vjp(views[0])
        gradient = pullback(views[1])
    tolerance = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 1e-6, "float64": 1e-14}[dtype]
    np.testing.assert_allclose(back(found).astype(np.float64), y, rtol=tolerance, atol=1e-7)
    scale = np.abs(expected).max() + 1e-30
    np.testing.assert_allclose(back(gradient).astype(np.float64) / scale, expected / scale, atol=8 * tolerance)


@pytest.mark.parametrize("columns", [10, 1000, 4100])
def test_split_and_cluster_give_the_bits_of_one_block(columns: int) -> None:
    """The order of a sum is the row's own, whoever adds it up."""
    columns *= 10  # 100, 10,000 and 41,000
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, columns)).astype(np.float32)
    target = rng.integers(0, columns, 2)
    bits, regimes = [], set()
    for device in (MANY, Device(), A100, Device(80, 1, 1 << 20), Device(80, 1, 40_000)):
        with host.running(host.Host(device)) as running:
            loss, g = xpnn.cross_entropy.value_and_grad(on_host(x), on_host(target))
            bits.append((back(loss).tobytes(), back(g).tobytes(), back(xpnn.softmax(on_host(x))).tobytes()))
            regimes |= set(running.launched) - {"values"}
    assert len(set(bits)) == 1
    assert columns < 20_000 or regimes >= {"cluster", "split", "shared", "passes"}


def test_in_place(machine: host.Host) -> None:
    """The gradient over the logits, in every regime; also an output over an input that the kernel gathers from."""
    rng = np.random.default_rng(3)
    for device, columns in ((MANY, 10), (MANY, 500), (MANY, 4100), (MANY, 20_000), (Device(), 20_000), (A100, 41_000)):
        x = rng.standard_normal((3, columns)).astype(np.float32)
        t = rng.integers(0, columns, 3)
        with host.running(host.Host(device)):
            logits, target = on_host(x), on_host(t)
            loss, expected = (back(a) for a in xpnn.cross_entropy.value_and_grad(logits, target))
            for _ in range(2):  # the long way, then the short one
                host.as_numpy(logits)[...] = x
                again, g = xpnn.cross_entropy.value_and_grad(logits, target, out=logits)
                assert g is logits
                np.testing.assert_array_equal(back(logits), expected)
                assert back(again) == loss
            a = on_host(x)
            y = back(xpnn.softmax(a))
            assert xpnn.softmax(a, out=a) is a
            np.testing.assert_array_equal(back(a), y)


def test_an_output_over_an_input_that_is_read_later(machine: host.Host) -> None:
    """One result is known a phase before another that needs the input too."""

    @xpnn.kernel(outputs=("centred", "scaled"))
    def two(xp: Any, x: Any) -> Any:
        centred = x - xp.max(x, axis=-1, keepdims=True)
        return centred, x / xp.sum(centred, axis=-1, keepdims=True)

    rng = np.random.default_rng(12)
    for device, columns in ((MANY, 40), (MANY, 4100), (Device(), 20_000), (A100, 70_000)):
        x = rng.standard_normal((2, columns))
        with choice.use_backend("numpy"):
            expected = two(x)
        with host.running(host.Host(device)):
            a = on_host(x)
            results = two(a, out=(a, cupy.empty(x.shape)))
            for found, want in zip(results, expected, strict=True):
                np.testing.assert_allclose(back(found), want, rtol=1e-11)


def test_out_must_not_overlap_partly(machine: host.Host) -> None:
    room = cupy.empty((4, 10), np.float32)
    host.as_numpy(room)[...] = 1
    with pytest.raises(ValueError, match="overlaps"):
        xpnn.softmax(room[:3], out=room[1:])
    assert (host.as_numpy(room) == 1).all()
    left, right = room[:, :5], room[:, 5:]  # side by side: no memory in common
    assert xpnn.softmax(left, out=right) is right
    np.testing.assert_allclose(back(right), 0.2, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_targets_of_any_integer_type(machine: host.Host, dtype: str) -> None:
    rng = np.random.default_rng(4)
    x, t = rng.standard_normal((6, 11)), rng.integers(0, 11, 6)
    found = back(xpnn.cross_entropy(on_host(x), on_host(t.astype(dtype))))
    np.testing.assert_allclose(found, ORACLES["cross_entropy"](x, t), rtol=1e-13)
    if dtype == "uint64":  # 2**64 - 100 is not the ignored -100
        far = np.full(6, 2**64 - 100, np.uint64)
        assert np.isnan(back(xpnn.cross_entropy(on_host(x), on_host(far), reduction="none"))).all()


@pytest.mark.parametrize("columns", [11, 5000])
def test_targets_out_of_range(machine: host.Host, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN loss and zero gradient for that row, and no look at memory; an IndexError where XPNN_CHECK=1 asks for it."""
    rng = np.random.default_rng(5)
    x, t = rng.standard_normal((5, columns)), rng.integers(0, columns, 5)
    good = t.copy()
    t[1], t[3], t[4] = columns, -1, -100
    for _ in range(2):
        loss, pullback = xpnn.cross_entropy.vjp(on_host(x), on_host(t), reduction="none")
        assert list(np.isnan(back(loss))) == [False, True, False, True, False]
        assert back(loss)[4] == 0
        g = back(pullback(on_host(np.ones(5)))[0])
        assert (g[[1, 3, 4]] == 0).all()
        assert (np.abs(g[[0, 2]]).sum(1) > 0).all()
        total, gradient = xpnn.cross_entropy.value_and_grad(on_host(x), on_host(t))
        assert np.isnan(back(total))
        assert (back(gradient)[[1, 3, 4]] == 0).all()
    monkeypatch.setenv("XPNN_CHECK", "1")
    for _ in range(2):
        with pytest.raises(IndexError, match=rf"target\[1\]: got {columns}, expected 0 <= target < {columns}"):
            xpnn.cross_entropy.value_and_grad(on_host(x), on_host(t))
    xpnn.cross_entropy.value_and_grad(on_host(x), on_host(good))


def test_half_precision_losses_keep_their_cotangent(machine: host.Host) -> None:
    """Loss and cotangent are float32, gradients in the logits' dtype."""
    rng = np.random.default_rng(10)
    x, t = rng.standard_normal((6, 40)).astype(np.float16), rng.integers(0, 40, 6)
    loss, pullback = xpnn.cross_entropy.vjp(on_host(x), on_host(t), reduction="none")
    dy = rng.standard_normal(6).astype(np.float32)
    g = back(pullback(on_host(dy))[0])
    assert (loss.dtype, g.dtype) == (np.float32, np.float16)
    wide = x.astype(np.float64)
    with choice.use_backend("numpy"):
        expected, pull = xpnn.cross_entropy.vjp(wide, t, reduction="none")
        want = pull(dy.astype(np.float64))[0]
    np.testing.assert_allclose(back(loss), expected, rtol=1e-6)
    np.testing.assert_allclose(g, want, rtol=1e-3, atol=1e-7)


def test_the_short_way_gives_up(machine: host.Host) -> None:
    """A call that is not like the one that made the short way takes the long one, with the same results and errors."""
    rng = np.random.default_rng(11)
    x = rng.standard_normal((4, 6))
    with choice.use_backend("numpy"):
        expected = xpnn.softmax(x)
    for _ in range(2):
        np.testing.assert_allclose(back(xpnn.softmax(on_host(x))), expected, rtol=1e-14)
    wide = on_host(np.concatenate([x, x], axis=1))
    np.testing.assert_allclose(back(xpnn.softmax(wide[:, :6])), expected, rtol=1e-14)
    np.testing.assert_allclose(back(xpnn.softmax(on_host(x.astype(np.float32)))), expected, rtol=1e-5)
    np.testing.assert_allclose(back(xpnn.softmax(on_host(x[0]))), expected[0], rtol=1e-14)
    assert xpnn.softmax(on_host(x[:0])).shape == (0, 6)
    with pytest.raises(ValueError, match="shape"):
        xpnn.softmax(on_host(x), out=on_host(x[:2]))
    with pytest.raises(TypeError, match="out"):
        xpnn.softmax(on_host(x), out=np.empty((4, 6)))
    y, pullback = xpnn.tanh.vjp(on_host(x))
    for _ in range(2):
        np.testing.assert_allclose(back(pullback(on_host(x))), x * (1 - np.tanh(x) ** 2), rtol=1e-12)
    assert y.shape == (4, 6)


def test_products(machine: host.Host) -> None:
    rng = np.random.default_rng(6)
    for dtype in ("float32", "float16"):
        x, w, b = (rng.standard_normal(s).astype(dtype) for s in ((7, 20), (12, 20), (12,)))
        y, pullback = xpnn.linear.vjp(on_host(x), on_host(w), on_host(b), activation=xpnn.relu)
        expected = ORACLES["linear"](*(a.astype(np.float64) for a in (x, w, b)), activation=xpnn.relu)
        np.testing.assert_allclose(back(y), expected, atol=2e-2 if dtype == "float16" else 1e-5)
        dy = rng.standard_normal((7, 12)).astype(dtype)
        dx, dw, db = (back(g) for g in pullback(on_host(dy)))
        dz = dy.astype(np.float64) * (expected > 0)
        for found, want in ((dx, dz @ w), (dw, dz.T @ x), (db, dz.sum(0))):
            assert found.dtype == dtype
            np.testing.assert_allclose(found, want, atol=6e-2 if dtype == "float16" else 1e-4)


def test_shapes_of_every_kind(machine: host.Host) -> None:
    """Leading dimensions, a number, one element, one long row."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((2, 3, 5))
    with choice.use_backend("numpy"):
        expected = xpnn.softmax(x)
    np.testing.assert_allclose(back(xpnn.softmax(on_host(x))), expected, rtol=1e-14)
    assert back(xpnn.softmax(on_host(np.array(3.0)))) == 1
    assert back(xpnn.relu(on_host(np.array([[-1.0]])))) == 0
    assert back(xpnn.tanh(on_host(np.linspace(-1, 1, 10_001)))).shape == (10_001,)


def test_many_rows(machine: host.Host) -> None:
    """Totals over more rows than one block adds up; sums of columns over many rows."""
    rng = np.random.default_rng(9)
    x, t = rng.standard_normal((20_000, 3)), rng.integers(0, 3, 20_000)
    loss, _ = xpnn.cross_entropy.value_and_grad(on_host(x), on_host(t))
    np.testing.assert_allclose(back(loss), ORACLES["cross_entropy"](x, t), rtol=1e-13)
    w = rng.standard_normal((4, 3))
    _, pullback = xpnn.linear.vjp(on_host(x), on_host(w), on_host(np.zeros(4)), activation=xpnn.relu)
    dy = rng.standard_normal((20_000, 4))
    np.testing.assert_allclose(back(pullback(on_host(dy))[2]), (dy * (x @ w.T > 0)).sum(0), rtol=1e-11)


@pytest.mark.parametrize("name", ORACLES)
def test_oracles(name: str, machine: host.Host) -> None:
    """Values equal those of references of another make."""
    kernel: Kernel = getattr(exported := getattr(xpnn, name), "kernel", exported)  # glu's is within it
    for variant in variants(kernel):
        arrays = sample(kernel, variant, (4, 7), "float64", 0)
        found = kernel(**{n: on_host(a) for n, a in arrays.items()}, **dict(variant.options))
        expected = ORACLES[name](**arrays, **dict(variant.options))
        both = [v if isinstance(v, tuple) else (v,) for v in (found, expected)]
        for ours, theirs in zip(*both, strict=True):
            np.testing.assert_allclose(back(ours), theirs, rtol=1e-12, atol=1e-12)


def test_a_wrong_kernel_is_caught(machine: host.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emitted code that leaves out the last columns, one lane, or one chunk breaches the bound."""
    variant = next(iter(variants(xpnn.softmax)))
    arrays = sample(xpnn.softmax, variant, (3, 2053), "float32", 0)
    truth = truth_of(xpnn.softmax, "forward", arrays, {}, "float32")
    load = host.load
    for old, new in (
        ("+ i < width)", "+ i < width - 1)"),
        ("for (int o = LANES / 2; o; o /= 2)", "for (int o = LANES / 4; o; o /= 2)"),
        ("over_chunks<Sum>(parts + 1 * slots, chunks)", "over_chunks<Sum>(parts + 1 * slots, chunks - 1)"),
    ):

        def broken(text: str, flags: tuple[str, ...], old: str = old, new: str = new) -> Any:
            assert old in text
            return load(text.replace(old, new), flags)

        with monkeypatch.context() as patch, host.running(host.Host(MANY)):
            patch.setattr(host, "load", broken)
            results = _compute(xpnn.softmax, "forward", arrays, {}, "cupy")
        assert truth.excess(results)[2] > 0, old


def test_errors_name_the_backend(machine: host.Host) -> None:
    with pytest.raises(TypeError, match="mix of cupy and numpy"):
        xpnn.cross_entropy(on_host(np.ones((2, 3))), np.zeros(2, int))
    with choice.use_backend("numba"), pytest.raises(RuntimeError, match="takes NumPy arrays, got cupy"):
        xpnn.softmax(on_host(np.ones(3)))
    with choice.use_backend("cupy"), pytest.raises(RuntimeError, match="takes CuPy arrays, got numpy"):
        xpnn.softmax(np.ones(3))
    assert xpnn.softmax.explain(on_host(np.ones(3))) == "cupy"
