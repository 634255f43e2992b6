"""The picture that `xpnn plot` writes: activations beside their derivatives, drawn by the kernels themselves.

Nothing is listed here. Curves, ranges and flat parts are computed; the formula is the `.. math::` of a kernel's docstring, and
where there is none, its first line.
"""

from __future__ import annotations

import inspect
import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xpnn.backends.kernel import Kernel
from xpnn.curves import EDGE, SHARE, Curve, X, bounds, curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

INK, PALE, FLAT = "#1f2937", "#6b7280", "#e5e7eb"
COLOURS = "#1d4ed8", "#c2410c"  # of g and g′
WIDE, HIGH, FOOT = 5.0, 2.4, 0.3  # inches: a kernel's two panels, and the line below all
LEFT, RIGHT = 0.065, 0.985  # edges of the panels within
_MATH = re.compile(r"\.\. math::\s*(.+?)(?:\n\s*\n|\Z)", re.DOTALL)


def picture(kernels: Sequence[Kernel], done: Callable[[Kernel], Any] = lambda kernel: None) -> Figure:
    """Each kernel and its derivative side by side, with formula, range, largest slope, and the parts where it saturates.

    Parameters
    ----------
    kernels
        Element-wise kernels of one real input, each with a backward. They are drawn with their options' defaults.
    done
        Called after each kernel.

    Returns
    -------
    matplotlib.figure.Figure
        Each kernel is a sub-figure of two axes. `savefig` writes it; no window and no global state is touched.

    Raises
    ------
    ModuleNotFoundError
        Where matplotlib is not installed.
    TypeError
        For a kernel that is not such an activation.
    ValueError
        Without kernels.

    Examples
    --------
    >>> import xpnn
    >>> from xpnn.plot import picture
    >>> figure = picture([xpnn.tanh, xpnn.relu])
    >>> [axes.get_xlabel() for axes in figure.axes]  # doctest: +NORMALIZE_WHITESPACE
    ['range (−1, 1)', 'at most 1\\nsaturated for |x| ≥ 3', 'range [0, ∞)', 'at most 1\\nsaturated for x ≤ 0']
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"pictures need matplotlib ({error}): pip install 'xpnn[plot]'") from error
    if not kernels:
        raise ValueError("picture: kernels: got none, expected at least one")
    columns = min(2, len(kernels))
    rows = math.ceil(len(kernels) / columns)
    figure = Figure(figsize=(WIDE * columns, HIGH * rows + FOOT), facecolor="white")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(HIGH * rows, FOOT), hspace=0).flat
    cells = above.subfigures(rows, columns, squeeze=False, wspace=0, hspace=0)
    for kernel, cell in zip(kernels, cells.flat, strict=False):
        _draw(kernel, curve(kernel), cell)
        done(kernel)
    note = f"Shaded, saturated: |g′| is less than {SHARE:.0%} of its largest value for −{EDGE:g} ≤ x ≤ {EDGE:g}."
    below.text(LEFT / columns, 0.5, note, color=PALE, fontsize=8, va="center")
    return figure


def write(figure: Figure, path: Path) -> None:
    """Write a picture, as .svg or as .png; a .png in 256 colours, which takes a third of the room."""
    if path.suffix == ".svg":
        figure.savefig(path)
        return
    from PIL import Image

    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    Image.open(stream).convert("RGB").quantize(256).save(path, optimize=True)


def formula(kernel: Kernel) -> str | None:
    """The `.. math::` of a kernel's docstring, as matplotlib sets it, or None.

    Examples
    --------
    >>> import xpnn
    >>> from xpnn.plot import formula
    >>> formula(xpnn.relu)
    '$g(x) = \\\\max(0, x)$'
    """
    found = _MATH.search(inspect.cleandoc(kernel.__doc__ or ""))
    return f"${' '.join(found[1].split())}$".replace(r"\frac", r"\dfrac") if found else None


def _draw(kernel: Kernel, drawn: Curve, cell: SubFigure) -> None:
    options = ", ".join(f"{name} = {value}" for name, value in kernel.declaration.options.items())
    cell.text(LEFT, 0.93, kernel.__name__, color=INK, fontsize=11, weight="bold", va="top")
    cell.text(RIGHT, 0.925, options, color=PALE, fontsize=8, va="top", ha="right", parse_math=False)
    if (text := formula(kernel)) is not None:
        cell.text(LEFT, 0.75, text, color=INK, fontsize=11, va="center", math_fontfamily="cm")
    else:
        own = inspect.cleandoc(kernel.forward_formula.__doc__ or "")
        first = textwrap.shorten(own.partition("\n")[0], 72, placeholder=" …")
        cell.text(LEFT, 0.75, first, color=INK, fontsize=9, va="center", parse_math=False)
    panels = cell.subplots(1, 2, gridspec_kw={"left": LEFT, "right": RIGHT, "top": 0.645, "bottom": 0.245, "wspace": 0.16})
    near = np.abs(X) <= EDGE
    flat = drawn.flat()
    for axes, name, values, colour in zip(panels, ("g", "g′"), (drawn.y, drawn.slope), COLOURS, strict=True):
        for start, stop in flat:
            axes.axvspan(max(start, -EDGE), min(stop, EDGE), color=FLAT, linewidth=0)
        axes.axhline(0, color=PALE, linewidth=0.5)
        axes.axvline(0, color=PALE, linewidth=0.5)
        axes.plot(X[near], values[near], color=colour, linewidth=1.6, label=name)
        _plain(axes)
        axes.annotate(name, (0.03, 0.95), xycoords="axes fraction", color=colour, fontsize=10, va="top", style="italic")
    low, high, left, right = bounds(drawn.y)
    panels[0].set_xlabel(f"range {'[' if left else '('}{_number(low)}, {_number(high)}{']' if right else ')'}")
    high = bounds(drawn.slope)[1]
    most = f"at most {_number(high)}" if math.isfinite(high) else "unbounded"
    panels[1].set_xlabel("\n".join([most, *([f"saturated for {_places(flat)}"] if flat else [])]))


def _plain(axes: Axes) -> None:
    axes.set_facecolor("white")
    axes.set_xlim(-EDGE, EDGE)
    axes.set_xticks([-EDGE, -EDGE / 2, 0, EDGE / 2, EDGE])
    axes.margins(y=0.08)
    axes.locator_params(axis="y", nbins=4)
    axes.tick_params(colors=PALE, labelsize=7, length=2, pad=2)
    axes.xaxis.label.set(color=INK, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)


def _number(value: float) -> str:
    if math.isinf(value):
        return "−∞" if value < 0 else "∞"
    return f"{value + 0.0:.3g}".replace("-", "−")


def _places(flat: Sequence[tuple[float, float]]) -> str:
    """Intervals in words: |x| ≥ 3; x ≤ 0; −1 ≤ x ≤ 1."""
    if len(flat) == 2 and flat[0] == (-math.inf, -flat[1][0]) and flat[1][1] == math.inf:
        return f"|x| ≥ {_number(flat[1][0])}"
    found = []
    for start, stop in flat:
        before, after = f"{_number(start)} ≤ " * math.isfinite(start), f" ≤ {_number(stop)}" * math.isfinite(stop)
        found.append(f"{before}x{after}" if after or not before else f"x ≥ {_number(start)}")
    return " or ".join(found)
