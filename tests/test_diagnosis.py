"""What `xpnn.diagnose` says of a network's layers, counted by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

import xpnn
from xpnn.backends.kernel import registry
from xpnn.diagnosis import Diagnosis

RNG = np.random.default_rng(11)
NAN = math.nan
SLOPES = {
    "sigmoid": (lambda z: np.exp(-np.abs(z)) / (1 + np.exp(-np.abs(z))) ** 2, 0.25),
    "tanh": (lambda z: 1 / np.cosh(z) ** 2, 1.0),
    "relu": (lambda z: 1.0 * (z > 0), 1.0),
}


def network(m: int = 40) -> list[tuple[xpnn.Kernel, np.ndarray, np.ndarray]]:
    """A layer of each activation, some of whose units lie far to the left."""
    return [
        (getattr(xpnn, name), 5 * RNG.normal(size=(m, n)) - 4 * np.arange(n), RNG.normal(size=(n, 3)))
        for n, name in enumerate(SLOPES, 5)
    ]


def test_shares_and_norms(backend: str) -> None:
    given = network()
    for share in (0.01, 0.3):
        layers = xpnn.diagnose(given, share=share).layers
        for number, (found, (kernel, z, gradient)) in enumerate(zip(layers, given, strict=True), 1):
            slope, largest = SLOPES[kernel.__name__]
            assert (found.number, found.activation, found.units, found.examples) == (number, kernel.__name__, z.shape[1], 40)
            assert found.saturated == np.mean(slope(z) < share * largest)
            assert 0 < found.saturated < 1
            assert found.gradient == pytest.approx(np.linalg.norm(gradient), rel=1e-14)
    norms = [np.linalg.norm(g) for _, _, g in given]
    assert [f.ratio for f in layers[:2]] == pytest.approx([norms[0] / norms[1], norms[1] / norms[2]], rel=1e-14)
    assert layers[2].ratio is None
    relu = given[2][1]
    assert layers[2].dead == np.mean((relu <= 0).all(axis=0))
    assert 0 < layers[2].dead < 1
    assert layers[0].dead == layers[1].dead == 0


def test_batches_are_one_data_set() -> None:
    """In parts as in one: a unit is dead only if it is so in every part, and gradients count by their squares' mean."""
    (kernel, z, _) = network()[2]
    gradients = RNG.normal(size=(4, 2, 3))
    report = xpnn.diagnose()
    assert report.layers == []
    for part, gradient in zip(np.split(z, [1, 20, 25]), gradients, strict=True):
        report.update([(kernel, part, gradient)])
    (found,) = report.layers
    (whole,) = xpnn.diagnose([(kernel, z)]).layers
    assert (found.saturated, found.dead, found.examples) == (whole.saturated, whole.dead, whole.examples)
    (first,) = xpnn.diagnose([(kernel, z[:1])]).layers
    assert first.dead > whole.dead > 0
    assert whole.gradient is None
    assert found.gradient == pytest.approx(np.sqrt(np.mean(np.sum(gradients**2, (1, 2)))), rel=1e-14)
    report.update([(kernel, z)])  # without a gradient: the mean is over those that were there
    assert report.layers[0].gradient == found.gradient


def test_one_dead_unit_among_many_batches() -> None:
    report = xpnn.diagnose()
    z = -np.ones((3, 4))
    for unit in range(3):
        awake = z.copy()
        awake[unit, unit] = 0.5
        report.update([(xpnn.relu, awake)])
        assert report.layers[0].dead == (3 - unit) / 4


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_norms_whose_squares_leave_float32(scale: float) -> None:
    gradient = (scale * RNG.normal(size=(50, 60))).astype(np.float32)
    (found,) = xpnn.diagnose([(None, gradient, gradient)]).layers
    assert found.gradient == pytest.approx(np.linalg.norm(gradient.astype(np.float64)), rel=1e-6)
    assert (found.saturated, found.dead, found.activation) == (None, None, None)


def test_half_precision() -> None:
    z = RNG.normal(size=(64, 32)).astype(np.float16)
    gradient = np.full((400, 400), 3, np.float16)  # whose sum of squares is beyond float16
    (found,) = xpnn.diagnose([(xpnn.tanh, z, gradient)]).layers
    assert found.gradient == 1200
    assert found.saturated == np.mean(1 / np.cosh(z.astype(float)) ** 2 < 0.01)


@pytest.mark.parametrize(("gradient", "norm"), [([0.0, 0.0], 0.0), ([1.0, np.inf], np.inf), ([1.0, np.nan], np.nan), ([], 0.0)])
def test_special_gradients(gradient: list[float], norm: float) -> None:
    report = xpnn.diagnose([(None, np.ones((1, 1)), np.array(g)) for g in ([1.0], gradient)])
    first, last = report.layers
    assert str(report).splitlines()[-1].split()[-2] == f"{norm:.2e}"
    np.testing.assert_equal(last.gradient, norm)
    np.testing.assert_equal(first.ratio, 1 / norm if norm else math.nan)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["relu", "hardsigmoid"])  # whose slope at NaN is NaN, and 0
def test_what_is_not_finite_is_counted_and_hides_nothing(backend: str, name: str, bad: float) -> None:
    """One bad example among three leaves the other two as they are alone; a layer without an activation counts too."""
    kernel = getattr(xpnn, name)
    z = np.array([[-9.0, 0.5, -9.0], [-8.0, -9.0, 0.5]])
    (want,) = xpnn.diagnose([(kernel, z)]).layers
    assert (want.saturated, want.dead, want.nonfinite) == (4 / 6, 1 / 3, 0)
    spoilt = np.vstack([z, np.full((1, 3), bad)])
    found, bare = xpnn.diagnose([(kernel, spoilt), (None, spoilt)]).layers
    assert (found.saturated, found.dead, found.nonfinite) == (want.saturated, want.dead, 3)
    assert (bare.saturated, bare.dead, bare.nonfinite) == (None, None, 3)
    report = xpnn.diagnose([(kernel, spoilt[2:])])
    np.testing.assert_equal((report.layers[0].saturated, report.layers[0].dead, report.layers[0].nonfinite), (NAN, NAN, 3))
    report.update([(kernel, spoilt)])
    (both,) = report.layers
    assert (both.saturated, both.dead, both.nonfinite, both.examples) == (want.saturated, want.dead, 6, 4)


def test_a_unit_that_is_never_finite_is_neither_dead_nor_saturated() -> None:
    (found,) = xpnn.diagnose([(xpnn.relu, np.array([[NAN, -1.0, 1.0]]))]).layers
    assert (found.saturated, found.dead, found.nonfinite) == (0.5, 0.5, 1)


def test_a_slope_that_is_not_finite_is_counted() -> None:
    known = dict(registry)
    try:

        @xpnn.kernel
        def root(xp: Any, x: Any) -> Any:
            return xp.sqrt(abs(x))

        @root.backward
        def _(xp: Any, dy: Any, x: Any) -> Any:
            return xp.where(x == 0, xp.nan, dy / (2 * xp.sqrt(abs(x))))

        (found,) = xpnn.diagnose([(root, np.array([[0.0, 1.0], [4.0, 9.0]]))]).layers
        assert (found.nonfinite, found.dead) == (1, 0)
    finally:
        registry.clear()
        registry.update(known)


def test_shapes() -> None:
    """One example; many dimensions; a list."""
    z = RNG.normal(size=(4, 5, 6))
    (deep,), (flat,) = (xpnn.diagnose([(xpnn.relu, a)]).layers for a in (z, z.reshape(20, 6)))
    assert deep == flat
    assert deep.examples == 20
    for one in (np.array([-1.0, 2.0]), [-1.0, 2.0]):
        (found,) = xpnn.diagnose([(xpnn.relu, one)]).layers
        assert (found.units, found.examples, found.dead) == (2, 1, 0.5)


def test_libraries(library: Any) -> None:
    """Arrays of other libraries: the same, and none of them is changed."""
    given = network()
    arrays = [(kernel, library.array(z), library.array(g)) for kernel, z, g in given]
    want, got = xpnn.diagnose(given), xpnn.diagnose(arrays)
    want.update(given)
    got.update(arrays)
    for a, b in zip(want.layers, got.layers, strict=True):
        assert a.gradient == pytest.approx(b.gradient, rel=1e-12)
        assert (a.saturated, a.dead, a.examples) == (b.saturated, b.dead, b.examples)
    for (_, z, g), (_, zz, gg) in zip(given, arrays, strict=True):
        np.testing.assert_array_equal(library.numpy(zz), z)
        np.testing.assert_array_equal(library.numpy(gg), g)


def test_dask(load_library: Any) -> None:
    load_library("dask")
    import dask.array

    given = network()
    lazy = [(kernel, dask.array.from_array(z, 16), dask.array.from_array(g, 2)) for kernel, z, g in given]
    for a, b in zip(xpnn.diagnose(given).layers, xpnn.diagnose(lazy).layers, strict=True):
        assert a.gradient == pytest.approx(b.gradient, rel=1e-12)
        assert (a.saturated, a.dead) == (b.saturated, b.dead)


def test_a_kernel_of_ones_own() -> None:
    """The largest slope is computed, whatever it is."""
    known = dict(registry)
    try:

        @xpnn.kernel
        def steep(xp: Any, x: Any, *, by: float = 8.0) -> Any:
            return xp.tanh(by * x)

        @steep.backward
        def _(xp: Any, dy: Any, y: Any, *, by: float = 8.0) -> Any:
            return dy * (by * (1 - y * y))

        z = RNG.normal(size=(30, 4))
        (found,) = xpnn.diagnose([(steep, z)]).layers
        assert found.saturated == np.mean(1 / np.cosh(8 * z) ** 2 < 0.01)
    finally:
        registry.clear()
        registry.update(known)


def test_shown() -> None:
    report = xpnn.diagnose([*network(), (None, np.ones((40, 3)), np.ones(3))])
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "activation", "units", "saturated", "dead", "not", "finite", "gradient", "of", "next"]
    assert [line.split()[:3] for line in lines[2:]] == [
        ["1", "sigmoid", "5"],
        ["2", "tanh", "6"],
        ["3", "relu", "7"],
        ["4", "–", "3"],
    ]
    assert lines[-1].split()[3:] == ["–", "–", "0", "1.73e+00", "–"]
    found = report.to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["share"] == 0.01
    assert found["layers"][2]["dead"] == report.layers[2].dead
    assert repr(report) == "<diagnosis of 4 layers>"


Z = np.ones((2, 3))


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ([xpnn.relu], ValueError, r"diagnose: layer 1: got Kernel, expected \(activation, z\)"),
        ([(xpnn.relu, Z), (xpnn.relu,)], ValueError, r"diagnose: layer 2: got 1 of them, expected \(activation, z\)"),
        ([("relu", Z)], TypeError, "diagnose: layer 1: activation: got str, expected a kernel such as xpnn.relu"),
        ([(xpnn.softmax, Z)], TypeError, "softmax is no activation: its formula is not element-wise"),
        ([(xpnn.relu, "z")], TypeError, "diagnose: layer 1: z: got str, expected an array"),
        ([(xpnn.relu, Z * 1j)], TypeError, "diagnose: layer 1: z: got dtype complex128, expected real numbers"),
        ([(xpnn.relu, [1, 2])], TypeError, "diagnose: layer 1: z: got dtype int64, expected floating numbers"),
        ([(xpnn.relu, np.ones((0, 3)))], ValueError, r"diagnose: layer 1: z: got shape \(0, 3\), expected \(examples, units\)"),
        ([(xpnn.relu, np.ones(()))], ValueError, r"diagnose: layer 1: z: got shape \(\), expected"),
        ([(xpnn.relu, Z, "dW")], TypeError, "diagnose: layer 1: gradient: got str, expected an array"),
    ],
)
def test_bad_input(layers: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        xpnn.diagnose(layers)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([(xpnn.relu, Z)], "layers: got 1, expected 2, as in the batch before"),
        ([(xpnn.relu, Z)] * 3, "layers: got 3, expected 2"),
        ([(xpnn.relu, Z), (xpnn.tanh, Z)], "layer 2: got tanh of 3, expected relu of 3 units, as in the batch before"),
        ([(xpnn.relu, Z), (xpnn.relu, Z[:, :2])], "layer 2: got relu of 2, expected relu of 3 units"),
    ],
)
def test_another_network(layers: Any, message: str) -> None:
    """It is refused, and nothing of it is counted."""
    report = xpnn.diagnose([(xpnn.relu, Z), (xpnn.relu, Z)])
    before = report.layers
    with pytest.raises(ValueError, match=message):
        report.update(layers)
    assert report.layers == before


@pytest.mark.parametrize("share", [0, -0.1, 1.5, math.nan])
def test_bad_share(share: float) -> None:
    with pytest.raises(ValueError, match="diagnose: share: got"):
        xpnn.diagnose(share=share)


@pytest.mark.parametrize("share", ["a", None, True])
def test_share_of_another_type(share: Any) -> None:
    with pytest.raises(TypeError, match=f"^diagnose: share: got {share!r}, expected a number$"):
        xpnn.diagnose(share=share)


def test_type() -> None:
    assert isinstance(xpnn.diagnose(), Diagnosis)
