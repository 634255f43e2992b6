"""The picture of activations: what is drawn is what the kernels compute, and what it says of them is so."""

from __future__ import annotations

import io
import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import xpnn
from xpnn.backends.kernel import registry
from xpnn.cli import main
from xpnn.curves import EDGE, SHARE, bounds, curve, refusal
from xpnn.plot import formula, picture, write

pytest.importorskip("matplotlib", reason="matplotlib is not installed: no picture is drawn")

BUILT_IN = [k for k in registry.values() if k.__module__.startswith("xpnn.") and refusal(k) is None]
MINE = '''
import xpnn

@xpnn.kernel
def bounded(xp, x, *, low=-1.0, high=2.0):
    """Between low and high; no more than $2."""
    return xp.minimum(xp.maximum(x, low), high)
@bounded.backward
def _(xp, dy, x, *, low=-1.0, high=2.0):
    return xp.where((x > low) & (x < high), dy, 0.0)

@xpnn.kernel
def parabola(xp, x):
    r"""A square.

    .. math:: g(x) =
       \\frac{x^2}{2}
    """
    return x * x / 2
@parabola.backward
def _(xp, dy, x):
    return dy * x

@xpnn.kernel
def shrunk(xp, x):
    """Zero around zero."""
    return xp.where(xp.abs(x) <= 0.5, 0.0, x)
@shrunk.backward
def _(xp, dy, x):
    return xp.where(xp.abs(x) <= 0.5, 0.0, dy)

@xpnn.kernel
def gated(xp, x):
    """A first line that is far longer than the place there is for it above the two panels, so that it must be cut."""
    e = xp.exp(-xp.abs(x))
    return x * (xp.where(x >= 0, 1.0, e) / (1.0 + e))
@gated.backward
def _(xp, dy, x):
    e = xp.exp(-xp.abs(x))
    s = xp.where(x >= 0, 1.0, e) / (1.0 + e)
    return dy * (s * (1.0 + x * (xp.where(x >= 0, e, 1.0) / (1.0 + e))))

@xpnn.kernel
def logarithmic(xp, x):
    return xp.where(x < 0, -1.0, 1.0) * xp.log1p(xp.abs(x))
@logarithmic.backward
def _(xp, dy, x):
    return dy / (1.0 + xp.abs(x))
'''


@pytest.fixture
def mine(tmp_path: Path) -> Iterator[Path]:
    """A file of kernels, which are forgotten afterwards."""
    known = dict(registry)
    path = tmp_path / "mine.py"
    path.write_text(MINE, encoding="utf-8")
    yield path
    registry.clear()
    registry.update(known)


@pytest.fixture
def kernels(mine: Path) -> Any:
    exec(compile(MINE, str(mine), "exec"), {"__name__": "mine"})
    return registry


def labels(figure: Any) -> list[tuple[str, ...]]:
    """What stands under the panels, by kernel."""
    return [(g.get_xlabel(), slope.get_xlabel()) for g, slope in zip(figure.axes[::2], figure.axes[1::2], strict=True)]


def test_lines_are_the_kernels_values(backend: str) -> None:
    figure = picture(BUILT_IN)
    assert {"sigmoid", "tanh", "relu"} <= {k.__name__ for k in BUILT_IN}
    assert len(figure.axes) == 2 * len(BUILT_IN)
    for kernel, g, slope in zip(BUILT_IN, figure.axes[::2], figure.axes[1::2], strict=True):
        (line,) = (line for line in g.lines if line.get_label() == "g")
        (steep,) = (line for line in slope.lines if line.get_label() == "g′")
        x, y = line.get_data()
        assert (x[0], x[-1]) == (-EDGE, EDGE)
        np.testing.assert_array_equal(y, kernel(x))
        np.testing.assert_array_equal(steep.get_data()[0], x)
        np.testing.assert_array_equal(steep.get_data()[1], kernel.vjp(x)[1](np.ones_like(x)))
        assert kernel.__name__ in [t.get_text() for t in g.figure.texts]


def test_what_is_said_of_the_notes_three() -> None:
    """Ranges and bounds of the notes; the ends of saturation solved by hand: σ(1 − σ) = 0.0025, 1 − tanh² = 0.01."""
    figure = picture([xpnn.sigmoid, xpnn.tanh, xpnn.relu])
    assert labels(figure) == [
        ("range (0, 1)", "at most 0.25\nsaturated for |x| ≥ 5.99"),
        ("range (−1, 1)", "at most 1\nsaturated for |x| ≥ 3"),
        ("range [0, ∞)", "at most 1\nsaturated for x ≤ 0"),
    ]
    root = math.sqrt(1 - SHARE)
    for kernel, end in ((xpnn.sigmoid, math.log((1 + root) / (1 - root))), (xpnn.tanh, math.atanh(root))):
        (start, low), (high, stop) = curve(kernel).flat()
        assert (start, stop) == (-math.inf, math.inf)
        assert -low == high == pytest.approx(end, abs=0.01)
    spans = [[p.get_x() for p in a.patches] for a in figure.axes]
    assert spans == [[-EDGE, 5.99]] * 2 + [[-EDGE, 3.0]] * 2 + [[-EDGE]] * 2


def test_what_is_said_of_others(kernels: Any, backend: str) -> None:
    """A closed range; no bounds; flat between and not at the ends; a turning point, where nothing is flat; slow growth."""
    figure = picture([kernels[n] for n in ("bounded", "parabola", "shrunk", "gated", "logarithmic")])
    assert labels(figure) == [
        ("range [−1, 2]", "at most 1\nsaturated for x ≤ −1 or x ≥ 2"),
        ("range [0, ∞)", "unbounded"),
        ("range (−∞, ∞)", "at most 1\nsaturated for −0.5 ≤ x ≤ 0.5"),
        ("range [−0.278, ∞)", "at most 1.1\nsaturated for x ≤ −6.15"),
        ("range (−∞, ∞)", "at most 1\nsaturated for |x| ≥ 99"),
    ]
    texts = [t.get_text() for t in figure.axes[0].figure.texts]
    assert texts == ["bounded", "low = -1.0, high = 2.0", "Between low and high; no more than $2."]


def test_the_slope_changes_what_is_shaded(kernels: Any) -> None:
    """Another backward, another picture: nothing is known but what the kernel computes."""

    @kernels["parabola"].backward
    def _(xp: Any, dy: Any, x: Any) -> Any:
        return xp.where(x < 3, dy, 0.001 * dy)

    figure = picture([kernels["parabola"]])
    assert labels(figure) == [("range [0, ∞)", "at most 1\nsaturated for x ≥ 3")]


def test_formulas(kernels: Any) -> None:
    assert formula(xpnn.sigmoid) == r"$g(x) = \dfrac{1}{1 + e^{-x}}$"
    assert formula(kernels["parabola"]) == r"$g(x) = \dfrac{x^2}{2}$"
    assert formula(kernels["bounded"]) is None


def test_nothing_overlaps(kernels: Any) -> None:
    """Every piece of text lies within the picture and beside every other, for one kernel as for many."""
    from matplotlib.text import Text

    drawable = [k for k in kernels.values() if refusal(k) is None]
    for chosen in (drawable[:1], drawable, (2 * drawable)[:15]):
        figure = picture(chosen)
        figure.savefig(io.BytesIO())  # only now are the numbers at the axes there
        beyond = set()  # numbers beyond the ends of an axis, which are made but not drawn
        for axis in itertools.chain.from_iterable((a.xaxis, a.yaxis) for a in figure.axes):
            low, high = axis.get_view_interval()
            beyond |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
        texts = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible() and t not in beyond]
        boxes = [(t.get_text(), t.get_window_extent()) for t in texts]
        assert len(boxes) > 10 * len(chosen)
        for text, box in boxes:
            assert figure.bbox.x0 <= box.x0, text
            assert box.x1 <= figure.bbox.x1, text
            assert figure.bbox.y0 <= box.y0, text
            assert box.y1 <= figure.bbox.y1, text
        for (a, first), (b, second) in itertools.combinations(boxes, 2):
            assert not first.overlaps(second), (a, b)


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_files(tmp_path: Path, suffix: str, start: bytes) -> None:
    path = tmp_path / f"picture{suffix}"
    write(picture([xpnn.tanh]), path)
    assert path.read_bytes().startswith(start)
    assert 5_000 < path.stat().st_size < 100_000
    assert "matplotlib.pyplot" not in sys.modules or sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_bounds_are_open_where_they_are_only_neared() -> None:
    assert bounds(curve(xpnn.sigmoid).y) == (0.0, 1.0, False, False)
    assert bounds(curve(xpnn.relu).y) == (0.0, math.inf, True, False)


# --- the command ----------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["plot", *map(str, arguments)])


def test_command(mine: Path, tmp_path: Path) -> None:
    """All activations; those of a file join them; some by name."""
    sizes = []
    for arguments in ((), ("--import", mine), ("--kernel", "relu")):
        to = tmp_path / "activations.png"
        done = run(to, *arguments)
        assert done.exit_code == 0, done.output
        sizes.append(to.stat().st_size)
    assert sizes[1] > sizes[0] > sizes[2] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("picture.jpg",), "ends in .png or .svg"),
        (("nowhere/picture.png",), "there is no folder nowhere"),
        (("picture.png", "--kernel", "softmax"), "softmax is no activation: its formula is not element-wise"),
        (("picture.png", "--kernel", "mse_loss"), "it has the inputs x, target"),
        (("picture.png", "--kernel", "log"), "log is no activation: x is positive, expected all real numbers"),
        (("picture.png", "--kernel", "rule"), "no kernel is called 'rule'"),
    ],
)
def test_command_refuses(arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.exit_code != 0
    assert message in done.output
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run(tmp_path / "picture.png")
    assert done.exit_code == 1
    assert "pip install 'xpnn[plot]'" in done.output


def test_a_kernel_without_backward(kernels: Any) -> None:
    @xpnn.kernel
    def alone(xp: Any, x: Any) -> Any:
        return x

    with pytest.raises(TypeError, match="alone is no activation: it has no backward"):
        picture([alone])
    with pytest.raises(ValueError, match="kernels: got none"):
        picture([])
