"""What a training loop's own arrays say of its layers: saturated and dead units, NaN, gradients that vanish or explode."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xpnn.backends import choice
from xpnn.backends.arrays import accept, dtype_class, namespace, wide_dtype, wrong
from xpnn.backends.bind import option_value
from xpnn.backends.kernel import Kernel
from xpnn.curves import SHARE, curve

if TYPE_CHECKING:
    from rich.table import Table

Given = tuple[Kernel | None, Any] | tuple[Kernel | None, Any, Any]  # activation, z, gradient


@dataclass(frozen=True)
class Layer:
    """What was found of one layer; None where it was given no activation or no gradient.

    Saturated and dead are told from the (unit, example) pairs at which z and g′(z) are finite: they are shares of those, and of
    the units that have one; NaN where there is none.

    Attributes
    ----------
    number
        1 for the layer next to the input.
    activation
        The kernel's name.
    units, examples
        How many; examples of all batches together.
    saturated
        The share of (unit, example) pairs with |g′(z)| below a share of the largest |g′|.
    dead
        The share of units with g′(z) = 0 for every example seen: what no gradient reaches, and no step changes.
    nonfinite
        How many (unit, example) pairs have a z or a g′(z) that is NaN or infinite.
    gradient
        The Euclidean norm of the gradient, NaN or infinite where the gradient is; over several batches the root of the mean of
        its squares.
    ratio
        That norm over the next layer's: below 1 the gradient shrinks on its way to the input.
    """

    number: int
    activation: str | None
    units: int
    examples: int
    saturated: float | None
    dead: float | None
    nonfinite: int
    gradient: float | None
    ratio: float | None


@dataclass(frozen=True)
class _Seen:
    """What one batch, or several, showed of a layer."""

    activation: Kernel | None
    steepest: float
    units: int
    examples: int
    saturated: int
    nonfinite: int
    finite: Any  # for each unit whether any of its examples was finite; None without activation
    alive: Any  # and whether its derivative was then ever other than zero
    gradients: tuple[float, int]  # the norm of all together, and how many

    def also(self, other: _Seen) -> _Seen:
        """This and another batch."""
        return dataclasses.replace(
            self,
            examples=self.examples + other.examples,
            saturated=self.saturated + other.saturated,
            nonfinite=self.nonfinite + other.nonfinite,
            finite=None if self.finite is None else self.finite | other.finite,
            alive=None if self.alive is None else self.alive | other.alive,
            gradients=(math.hypot(self.gradients[0], other.gradients[0]), self.gradients[1] + other.gradients[1]),
        )

    @property
    def gradient(self) -> float | None:
        norm, batches = self.gradients
        return norm / math.sqrt(batches) if batches else None

    def row(self, number: int, following: float | None) -> Layer:
        gradient, saturated, dead = self.gradient, None, None
        if self.activation is not None:
            looked_at, units = self.units * self.examples - self.nonfinite, _count(self.finite)
            saturated = self.saturated / looked_at if looked_at else math.nan
            dead = (units - _count(self.alive)) / units if units else math.nan
        return Layer(
            number=number,
            activation=None if self.activation is None else self.activation.__name__,
            units=self.units,
            examples=self.examples,
            saturated=saturated,
            dead=dead,
            nonfinite=self.nonfinite,
            gradient=gradient,
            ratio=None if gradient is None or following is None else gradient / following if following else math.nan,
        )


class Diagnosis:
    """What was found of each layer of a network: printed, a table. Made by `xpnn.diagnose`."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._seen: list[_Seen] = []

    @property
    def layers(self) -> list[Layer]:
        """A `Layer` for each, the first one next to the input."""
        following = [*(seen.gradient for seen in self._seen[1:]), None]
        return [seen.row(k, after) for k, (seen, after) in enumerate(zip(self._seen, following, strict=False), start=1)]

    def update(self, layers: Iterable[Given]) -> None:
        """Take in another batch of the same network.

        A unit is dead if it is so in every batch; saturation is counted over all examples.

        Parameters
        ----------
        layers
            As for `xpnn.diagnose`.

        Raises
        ------
        TypeError, ValueError
            As for `xpnn.diagnose`, and where the layers are not those of the batches before. Nothing is taken in then.
        """
        known = self._seen
        batch = []
        for number, layer in enumerate(layers, 1):
            before = known[number - 1] if number <= len(known) else None
            batch.append(_look(f"layer {number}", layer, self._share, before))
        if known and len(batch) != len(known):
            raise ValueError(wrong("diagnose", "layers", len(batch), f"{len(known)}, as in the batch before"))
        self._seen = [a.also(b) for a, b in zip(known, batch, strict=True)] if known else batch

    def to_dict(self) -> dict[str, Any]:
        """The same as numbers, strings and None, for JSON."""
        return {"share": self._share, "layers": [dataclasses.asdict(layer) for layer in self.layers]}

    def __repr__(self) -> str:
        return f"<diagnosis of {len(self._seen)} layers>"

    def __str__(self) -> str:
        from rich.console import Console

        stream = io.StringIO()
        Console(file=stream, width=100, color_system=None, legacy_windows=False).print(self)
        return "\n".join(line.rstrip() for line in stream.getvalue().rstrip().splitlines())

    def __rich__(self) -> Table:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for heading in ("layer", "activation", "units", "saturated", "dead", "not finite", "gradient", "of next"):
            table.add_column(heading, justify="left" if heading == "activation" else "right")
        for r in self.layers:
            shares = [_shown(value, ".1%") for value in (r.saturated, r.dead)]
            norms = [_shown(r.gradient, ".2e"), _shown(r.ratio, ".3g")]
            table.add_row(str(r.number), r.activation or "–", str(r.units), *shares, str(r.nonfinite), *norms)
        return table


def diagnose(layers: Iterable[Given] = (), *, share: float = SHARE) -> Diagnosis:
    """Say how much of a network has stopped learning: saturated and dead units, NaN, gradients from layer to layer.

    Parameters
    ----------
    layers
        For each layer, from the input to the output, a tuple of two or three:

        - the activation: an element-wise kernel with a backward, such as `xpnn.relu`; None for a layer without one
        - its input z, of shape (m, n) for m examples of n units, in any array library; more dimensions before the last count
          as examples too
        - a gradient, by the layer's weights or by its z, the same for every layer; may be left out, or None
    share
        A unit is saturated where |g′(z)| is below this share of the largest |g′|.

    Returns
    -------
    Diagnosis
        Prints as a table. Its `layers` are the rows, `to_dict()` the same for JSON; `update(layers)` takes in another batch. To
        go through a data set, begin without layers.

    Raises
    ------
    TypeError
        For an activation that is no kernel or not element-wise, for what is no array, and for a share that is no number.
    ValueError
        For a layer that is not such a tuple, without examples or units, and a share outside (0, 1].

    Notes
    -----
    Below z = 0 the slope of relu is 0: a relu counts as saturated there, and as dead if it is there for every example. The
    activation's slope comes from its backward, with its options' defaults. NaN and infinities are counted by themselves, and
    left out of what the others are shares of. Nothing is kept of the arrays.

    Examples
    --------
    Three units over two batches: the second is never active, the third only in the second batch.

    >>> import numpy as np, xpnn
    >>> z = np.array([[1.0, -1.0, -2.0], [-3.0, -1.0, -1.0]])
    >>> report = xpnn.diagnose([(xpnn.relu, z, np.array([3e-3, 4e-3])), (None, z, np.array([0.0, 0.5]))])
    >>> print(report)
    layer   activation   units   saturated    dead   not finite   gradient   of next
    ────────────────────────────────────────────────────────────────────────────────
        1   relu             3       83.3%   66.7%            0   5.00e-03      0.01
        2   –                3           –       –            0   5.00e-01         –
    >>> report.update([(xpnn.relu, z + np.array([0.0, 0.0, 3.0])), (None, z)])
    >>> round(report.layers[0].dead, 3)
    0.333
    """
    share = option_value("diagnose", "share", share, SHARE)
    if not 0 < share <= 1:
        raise ValueError(wrong("diagnose", "share", share, "a number in (0, 1]"))
    found = Diagnosis(share)
    found.update(layers)
    return found


def _look(where: str, layer: Any, share: float, before: _Seen | None) -> _Seen:
    """What a batch shows of a layer."""
    if not isinstance(layer, tuple | list) or len(layer) not in (2, 3):
        got = f"{len(layer)} of them" if isinstance(layer, tuple | list) else type(layer).__name__
        raise ValueError(wrong("diagnose", where, got, "(activation, z) or (activation, z, gradient)"))
    activation, given, gradient = (*layer, None)[:3]
    if activation is not None and not isinstance(activation, Kernel):
        expected = "a kernel such as xpnn.relu, or None"
        raise TypeError(wrong("diagnose", f"{where}: activation", type(activation).__name__, expected))
    z = accept("diagnose", f"{where}: z", given, None)
    if not z.ndim or not math.prod(z.shape):
        raise ValueError(wrong("diagnose", f"{where}: z", f"shape {tuple(z.shape)}", "(examples, units), at least one of each"))
    xp = namespace(z)
    if dtype_class(xp, "diagnose", f"{where}: z", z.dtype) != "float":
        raise TypeError(wrong("diagnose", f"{where}: z", f"dtype {z.dtype}", "floating numbers"))
    units = int(z.shape[-1])
    if before is not None and (activation, units) != (before.activation, before.units):
        expected = f"{before.activation and before.activation.__name__} of {before.units} units, as in the batch before"
        raise ValueError(wrong("diagnose", where, f"{activation and activation.__name__} of {units}", expected))
    z = xp.reshape(z, (-1, units))
    finite, steepest, saturated, known, alive = xp.isfinite(z), 0.0, 0, None, None
    if activation is not None:
        if before is not None:
            steepest = before.steepest
        else:
            with choice.use_backend("numpy"):  # whatever library z is of, and nothing to compile
                steepest = curve(activation).steepest
        slope = activation.vjp(z)[1](xp.ones_like(z))
        finite = finite & xp.isfinite(slope)
        saturated = _count(finite & (xp.abs(slope) < share * steepest))
        known, alive = xp.any(finite, axis=0), xp.any(finite & (slope != 0), axis=0)
    norm = (0.0, 0) if gradient is None else (_norm(accept("diagnose", f"{where}: gradient", gradient, None)), 1)
    return _Seen(activation, steepest, units, int(z.shape[0]), saturated, _count(~finite), known, alive, norm)


def _count(mask: Any) -> int:
    xp = namespace(mask)
    return int(xp.sum(xp.astype(mask, xp.int32)))


def _norm(gradient: Any) -> float:
    """The Euclidean norm, also of numbers whose squares are too small or too large for their dtype."""
    xp = namespace(gradient)
    size = xp.abs(xp.astype(gradient, wide_dtype(xp, gradient.dtype)))
    largest = float(xp.max(size)) if math.prod(size.shape) else 0.0
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * math.sqrt(float(xp.sum((size / largest) ** 2)))


def _shown(value: float | None, how: str) -> str:
    return "–" if value is None else format(value, how)


__all__ = ["Diagnosis", "Layer", "diagnose"]
