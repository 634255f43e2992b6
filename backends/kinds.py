"""The kinds of array a formula sees: every one is two-dimensional, whatever the caller's shapes."""

from __future__ import annotations

import types
from typing import Any


class Kind:
    """Base of the kinds; used as annotations on a formula's parameters, never instantiated."""


class Full(Kind):
    """(R, C): one value per row and column. What an unannotated parameter is."""


class Row(Kind):
    """(R, 1): one value per row."""


class Column(Kind):
    """(1, C): one value per column, such as class weights or a bias."""


class Scalar(Kind):
    """(1, 1) composed, a number when fused: one value."""


class Index(Kind):
    """(R, 1) integers: the number of a column for each row.

    Checked against [0, C) before a kernel runs; the value of an option called `ignore_index`, where there is one, passes.
    """


class Matrix(Kind):
    """A two-dimensional array of its own shape, such as a layer's weight; only `xp.matmul` reads it."""


class Wide(Kind):
    """(R, K): rows of another length than the inputs', such as a layer's output. Never an annotation."""


def kinds_of(annotation: Any) -> tuple[type[Kind], ...] | None:
    """The kinds that an annotation names; None where it names none.

    >>> kinds_of(Index | Full)
    (<class 'xpnn.backends.kinds.Index'>, <class 'xpnn.backends.kinds.Full'>)
    >>> kinds_of(float) is None
    True
    """
    parts = annotation.__args__ if isinstance(annotation, types.UnionType) else (annotation,)
    kinds = tuple(p for p in parts if isinstance(p, type) and issubclass(p, Kind))
    return kinds or None
