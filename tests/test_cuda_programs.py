"""Programs of every structure as CUDA kernels, run on the CPU: users' own, with any names, grids and hazards."""

import re
from typing import Any

import numpy as np
import pytest

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")

from cuda_helpers import A100, MANY, back, on_host  # noqa: E402

import xpnn  # noqa: E402
from xpnn.backends import choice  # noqa: E402
from xpnn.backends.cupy import host, inspect  # noqa: E402
from xpnn.backends.cupy.regime import Device  # noqa: E402
from xpnn.backends.kernel import Kernel, registry  # noqa: E402

pytestmark = pytest.mark.skipif(host.compiler() is None, reason="there is no C++ compiler to run CUDA kernels on the CPU")


def test_users_kernels(machine: host.Host) -> None:
    """Names that C++ or emitted code uses, other alphabets, sums over rows of what depends on a sum along the row."""

    @xpnn.kernel
    def awkward(xp: Any, double: Any, columns: Any, *, β: float = 0.5, new: int = 2) -> Any:
        share = double / xp.sum(xp.abs(double), axis=-1, keepdims=True)
        return share * β + columns * new

    @awkward.backward
    def awkward_backward(xp: Any, dy: Any, double: Any, columns: Any, *, β: float = 0.5, new: int = 2) -> Any:
        total = xp.sum(xp.abs(double), axis=-1, keepdims=True)
        return β * dy / total, dy * new

    @xpnn.kernel
    def normed(xp: Any, x: Any, weight: xpnn.Column) -> Any:
        scale = xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True))
        return x / scale * weight

    @normed.backward
    def normed_backward(xp: Any, dy: Any, x: Any, weight: xpnn.Column) -> Any:
        scale = xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True))
        n = x / scale
        d = dy * weight
        dx = (d - n * xp.mean(d * n, axis=-1, keepdims=True)) / scale
        return dx, xp.sum(dy * n, axis=0, keepdims=True)

    rng = np.random.default_rng(8)
    for shape in ((3, 7), (5, 1030), (300, 40)):
        x, z, w, dy = (
            rng.standard_normal(shape),
            rng.standard_normal(shape),
            rng.standard_normal(shape[1]),
            rng.standard_normal(shape),
        )
        with choice.use_backend("numpy"):
            y, pull = awkward.vjp(x, z, β=0.25)
            y2, pull2 = normed.vjp(x, w)
            expected, expected2 = pull(dy), pull2(dy)
        gy, gpull = awkward.vjp(on_host(x), on_host(z), β=0.25)
        np.testing.assert_allclose(back(gy), y, rtol=1e-12, atol=1e-14)
        for a, b in zip(gpull(on_host(dy)), expected, strict=True):
            np.testing.assert_allclose(back(a), b, rtol=1e-12, atol=1e-14)
        gy2, gpull2 = normed.vjp(on_host(x), on_host(w))
        np.testing.assert_allclose(back(gy2), y2, rtol=1e-12)
        for a, b in zip(gpull2(on_host(dy)), expected2, strict=True):
            np.testing.assert_allclose(back(a), b, rtol=1e-11, atol=1e-13)


def agrees(kernel: Kernel, *arrays: np.ndarray, devices: tuple[Device, ...] = (MANY,), rtol: float = 1e-11) -> None:
    with choice.use_backend("numpy"):
        expected = kernel(*arrays)
    for device in devices:
        with host.running(host.Host(device)):
            found = kernel(*(on_host(a) for a in arrays))
        pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
        for ours, want in pairs:
            np.testing.assert_allclose(back(ours), want, rtol=rtol, atol=1e-13)


def test_more_arrays_than_registers(machine: host.Host) -> None:
    """Rows of few chunks in a loop that could take many, over what lies in shared memory and what does not."""

    @xpnn.kernel
    def many(xp: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        m = xp.max(a * b, axis=-1, keepdims=True)
        return d * xp.sum(c - m, axis=-1, keepdims=True)

    rng = np.random.default_rng(14)
    for columns in (2050, 5000, 20_000):
        agrees(many, *rng.standard_normal((4, 3, columns)), devices=(MANY, A100, Device(75, 1, 65536)))


def test_a_small_device_runs_long_rows_that_start_anywhere() -> None:
    rng = np.random.default_rng(15)
    x = rng.standard_normal((3, 70_001)).astype(np.float32)
    agrees(xpnn.softmax, x, devices=(Device(75, 1, 65536),), rtol=1e-5)
    agrees(xpnn.softmax, x[:, :16_001], devices=(Device(75, 1, 65536),), rtol=1e-5)


def test_means_of_everything(machine: host.Host) -> None:
    """Extents of the other grid than the pass's."""

    @xpnn.kernel(outputs=("all", "down", "wide"))
    def means(xp: Any, x: Any) -> Any:
        s = xp.mean(x * x)
        return s, xp.mean(x * x, axis=0, keepdims=True), s * 2 * x.shape[-1] + 0 * x

    agrees(means, np.random.default_rng(16).standard_normal((5, 70)))


NAMES = re.findall(
    r"\w+",
    """X A W Z_ float int new index rows columns row lane T x_row max_0 max_0_part x_v x_here exp log fabs Max Sum Divisor row0
    total0 sums0 decltype typeid alignof static_assert thread_local threadIdx blockIdx over_group load_each user_float_ c k i
    b t v q s0 δ""",
)


def test_names_of_every_sort(machine: host.Host) -> None:
    """Words of C++, of CUDA and of the emitted code are as good as others."""
    text = f"""
def words(xp, {", ".join(NAMES)}):
    total = {" + ".join(NAMES)}
    e = xp.exp(total - xp.max(total, axis=-1, keepdims=True))
    return e / xp.sum(e, axis=-1, keepdims=True), xp.sum(total), xp.sum(total, axis=0, keepdims=True)
"""
    scope: dict[str, Any] = {}
    exec(text, scope)
    words = xpnn.kernel(outputs=("memory", "area", "parts"))(scope["words"])
    agrees(words, *np.random.default_rng(17).standard_normal((len(NAMES), 3, 5)))
    del registry["words"]
    inspect.compile_for(words.source(backend="cupy", shape=(100, 8)), 90)


def test_a_row_over_a_row(machine: host.Host) -> None:
    """One thread writes a number of the row that others still read."""

    @xpnn.kernel(outputs=("y", "r"))
    def updated(xp: Any, x: Any, w: xpnn.Row) -> Any:
        s = xp.sum(x, axis=-1, keepdims=True)
        return x * w + xp.max(x * s, axis=-1, keepdims=True), s + w

    rng = np.random.default_rng(18)
    for columns in (40, 4100):
        x, w = rng.standard_normal((3, columns)), rng.standard_normal(3)
        with choice.use_backend("numpy"):
            expected = updated(x, w)
        for seed in range(3):
            with host.running(host.Host(MANY, seed=seed)):
                over = on_host(w)
                found = updated(on_host(x), over, out=(cupy.empty(x.shape), over))
                for ours, want in zip(found, expected, strict=True):
                    np.testing.assert_allclose(back(ours), want, rtol=1e-11)


def test_in_place_over_a_view_with_gaps() -> None:
    """What is written elsewhere first has rows on 16-byte borders too."""
    rng = np.random.default_rng(19)
    x, t = rng.standard_normal((2, 40_001)).astype(np.float32), np.array([3, 40_000])
    with host.running(host.Host()) as running:
        loss, g = (back(a) for a in xpnn.cross_entropy.value_and_grad(on_host(x), on_host(t)))
        view = cupy.empty((2, 40_004), np.float32)[:, :40_001]
        host.as_numpy(view)[...] = x
        again, _ = xpnn.cross_entropy.value_and_grad(view, on_host(t), out=view)
        np.testing.assert_array_equal(back(view), g)
        assert back(again) == loss
        assert "split" in running.launched


def test_integers_stay_whole(machine: host.Host) -> None:
    @xpnn.kernel
    def equal(xp: Any, x: Any, i: xpnn.Index, *, n: int = 16777217) -> Any:
        return xp.astype(xp.maximum(i + n, 0) == i + n, x.dtype) + xp.astype(xp.abs(i - n) == n - i, x.dtype) + 0 * x

    @xpnn.kernel
    def picked(xp: Any, x: Any, i: xpnn.Index) -> Any:
        value = x
        for _ in range(12):
            value = value * value - value
        return xp.take_along_axis(value, i)

    @xpnn.kernel
    def own(xp: Any, x: Any, i: xpnn.Index, w: xpnn.Row) -> Any:
        return xp.take_along_axis(w, i)

    x, i = np.random.default_rng(20).uniform(0, 1, (3, 5)), np.array([0, 0, 0])
    agrees(picked, x, np.array([0, 4, 2]))
    agrees(equal, x, np.array([0, 4, 2]))
    agrees(own, x, i, np.ones(3))
    assert len(picked.source(backend="cupy")) < 12_000


def test_an_out_that_repeats_its_elements(machine: host.Host) -> None:
    with pytest.raises(ValueError, match="share memory"):
        xpnn.relu(on_host(np.ones((2, 3))), out=cupy.broadcast_to(cupy.empty(3), (2, 3)))


def test_numbers_of_numbers(machine: host.Host) -> None:
    """Options and totals deep inside values of rows, columns and the whole; more rows than one block adds up."""

    @xpnn.kernel(outputs=("row", "column", "total", "share"))
    def nested(xp: Any, x: Any, r: xpnn.Row, *, a: float = 0.5, b: float = 2.0) -> Any:
        count = xp.sum(xp.astype(r > 0, x.dtype), axis=None)
        row = r * (1 + (r - (a / (b + r * (a + b)))) / count)
        column = xp.sum(x * (r + a / (b + count)) / (a + b), axis=0, keepdims=True)
        total = xp.sum(row * (x / count), axis=None)
        return row, column, total, a / (b + count)

    rng = np.random.default_rng(13)
    for rows in (5, 20_000):
        x, r = rng.standard_normal((rows, 3)), rng.uniform(0.5, 1.5, rows)
        with choice.use_backend("numpy"):
            expected = nested(x, r, a=0.25)
        for found, want in zip(nested(on_host(x), on_host(r), a=0.25), expected, strict=True):
            np.testing.assert_allclose(back(found), want, rtol=1e-11)
