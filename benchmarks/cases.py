"""What is measured: a kernel in one direction, on arrays of one shape and dtype.

Cases follow from the registry: a kernel's kinds tell which shapes suit it, its outputs which directions it has. A
user's own kernel gets them like the built-in ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

import xpnn
from xpnn.backends import prepare
from xpnn.backends.arrays import numpy_dtype
from xpnn.backends.kernel import Kernel
from xpnn.backends.kinds import Index, Matrix
from xpnn.backends.phases import DEAR
from xpnn.backends.program import Node, Program, walk
from xpnn.backends.task import HALF

SEED = 20240607
Array = np.ndarray[Any, Any]

# (shape, where such shapes come from, whether the quick run has it)
ROWS = (
    ((1, 10), "one handwritten digit (MNIST)", False),
    ((64, 10), "a batch of digits (MNIST)", True),
    ((4096, 10), "a large batch of digits (MNIST)", False),
    ((4096, 100), "CIFAR-100 classes", False),
    ((4096, 1000), "ImageNet classes", True),
    ((1024, 30522), "BERT vocabulary", False),
    ((2048, 32000), "Llama 2 vocabulary", False),
    ((512, 50257), "GPT-2 vocabulary", False),
    ((512, 128256), "Llama 3 vocabulary", False),
    ((512, 256000), "Gemma vocabulary", False),
)
FLAT = (
    ((2**10,), "one small hidden layer, fits L1", False),
    ((2**16,), "64 examples × 1024 units, fits L2", True),
    ((2**20,), "1024 × 1024 units, fits L3", True),
    ((2**24,), "4096 × 4096 units, memory", False),
)
HIDDEN = (
    ((64, 1024), "hidden states of 64 words", True),
    ((512, 768), "of a sentence (BERT base)", False),
    ((4096, 768), "of eight texts (BERT base)", True),
    ((2048, 4096), "of a text (Llama 2)", False),
    ((8192, 2048), "of four texts (Llama 3.2)", False),
)
PRODUCTS = (
    ((8192, 64, 32), "a recommender's tower", False),
    ((64, 784, 128), "first layer for digits (MNIST)", True),
    ((4096, 784, 128), "the same, large batch", True),
    ((2048, 768, 3072), "feed-forward layer (BERT base)", False),
)
HEADS = (
    ((512, 64, 8000), "a small language model's head", True),
    ((2048, 512, 64000), "a language model's head", False),
)

# How kernels with optional parts are usually called: inputs that may be left out but are not, and options.
USUAL_INPUTS: dict[str, tuple[str, ...]] = {
    "linear": ("bias",),
    "layer_norm": ("weight", "bias"),
    "rms_norm": ("weight",),
    "sgd": ("momentum_buffer",),
}
USUAL_OPTIONS: dict[str, dict[str, Any]] = {"linear": {"activation": xpnn.relu}, "sgd": {"momentum": 0.9}}
# Steps that are made in place: the input that each result is written over.
IN_PLACE: dict[str, tuple[str, ...]] = {
    "sgd": ("param", "momentum_buffer"),
    "adagrad": ("param", "state_sum"),
    "adam": ("param", "exp_avg", "exp_avg_sq"),
    "adamw": ("param", "exp_avg", "exp_avg_sq"),
}


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes
    ----------
    shape
        (R, C) for kernels along rows, (N,) for element-wise ones, (R, C, K) for a layer from C to K units or classes.
    direction
        "forward"; "backward", given what `vjp` keeps; or "value_and_grad", the fused pass.
    source
        Where such shapes come from.
    """

    kernel: Kernel
    direction: str
    shape: tuple[int, ...]
    dtype: str
    source: str

    @property
    def group(self) -> str:
        """Kernel and direction, with the options that are not the defaults."""
        options = [getattr(v, "__name__", f"{n}={v}") for n, v in self.options.items()]
        return " ".join(["+".join([self.kernel.__name__, *options]), self.direction])

    @property
    def size(self) -> str:
        """The shape as people write it: 4096x1000, 64K."""
        if len(self.shape) > 1:
            return "x".join(map(str, self.shape))
        (n,) = self.shape
        return f"{n >> 20}M" if n >= 1 << 20 else f"{n >> 10}K"

    @property
    def name(self) -> str:
        """What tells the case from all others."""
        return f"{self.group} {self.size} {self.dtype}"

    @property
    def options(self) -> dict[str, Any]:
        """Options other than the defaults."""
        return USUAL_OPTIONS.get(self.kernel.__name__, {})

    @property
    def in_place(self) -> tuple[str, ...]:
        """The inputs that results are written over, one for each; none where results have arrays of their own."""
        built_in = self.kernel is getattr(xpnn, self.kernel.__name__, None)
        return IN_PLACE.get(self.kernel.__name__, ()) if built_in else ()

    @property
    def dimensions(self) -> int:
        """How many numbers the shape of such a case has."""
        return 3 if self.is_product else 2 if _by_rows(self.kernel) else 1

    @property
    def is_product(self) -> bool:
        """Whether a matrix product, not memory, bounds it."""
        return _has_matrix(self.kernel)

    @functools.cached_property
    def program(self) -> Program:
        """What the direction reads and writes, traced but not compiled.

        Raises
        ------
        SubsetError
            Where the formula cannot be fused.
        """
        return self._program(self.direction)

    @functools.cached_property
    def bytes(self) -> int:
        """Bytes that must be moved: each array that is read, once, and each result, once."""
        reads = self.program.reads()
        read = {name: n for name, n in self.program.inputs.items() if name in reads}
        return sum(self._bytes(name, n) for name, n in (*read.items(), *self.program.outputs.items()))

    @functools.cached_property
    def written(self) -> int:
        """The part of `bytes` that is written."""
        return sum(self._bytes(name, n) for name, n in self.program.outputs.items())

    def _bytes(self, name: str, node: Node) -> int:
        width = {"float": numpy_dtype(self._stored(name, node)).itemsize, "int": 8, "bool": 1}[node.dtype]
        return math.prod(self._extents(node.shape)) * width

    def _stored(self, name: str, node: Node) -> str:
        """The dtype of an array of floats."""
        wide = self.dtype in HALF and self.kernel.declaration.is_wide(name, node.shape[1] == 1)
        return "float32" if wide else self.dtype

    @functools.cached_property
    def operations(self) -> dict[str, int]:
        """How often each function is evaluated that takes far longer than an addition; of a layer, its multiplications."""
        if self.is_product:
            products = sum(n.op == "matmul" for n in walk(self.program.outputs.values()))
            return {"multiply-add": products * math.prod(self.shape)}
        found: dict[str, int] = {}
        for n in walk(self.program.outputs.values()):
            if n.op in DEAR:
                found[n.op] = found.get(n.op, 0) + math.prod(self._extents(n.shape))
        return found

    def arrays(self) -> dict[str, Array]:
        """The inputs and, as "d" + an output's name, its cotangent; the same numbers whenever it is called."""
        rng = np.random.default_rng(SEED)
        d = self.kernel.declaration
        forward = self._program("forward")
        made: dict[str, Array] = {}
        for name, node in forward.inputs.items():
            rows, columns = self._extents(node.shape)
            if node.dtype == "int":
                made[name] = rng.integers(0, self.shape[-1], rows)
            else:
                values = _sample(rng, rows, columns, self._stored(name, node), d.domain.get(name, "real"))
                if Matrix in d.inputs[name].kinds:  # as networks are initialised, so that logits are about 1
                    made[name] = np.asarray(values * columns**-0.5, values.dtype)
                else:
                    made[name] = values.reshape(self._public(node.shape))
        if self.direction == "backward":
            for name, node in forward.outputs.items():
                rows, columns = self._extents(node.shape)
                values = _sample(rng, rows, columns, self.dtype, "real")
                made["d" + name] = values.reshape(self._public(node.shape))
        return made

    def _program(self, direction: str) -> Program:
        given = dict.fromkeys(USUAL_INPUTS.get(self.kernel.__name__, ()), True)
        # the composed backend prepares a task without compiling it
        job = prepare.example_task(self.kernel, self.dtype, direction, {**given, **self.options}, backend="numpy").job
        return job.program()

    def _extents(self, symbols: tuple[str | int, str | int]) -> tuple[int, int]:
        """Symbolic rows and columns in numbers; a symbol that is neither R nor C is the layer's width, K."""
        rows, columns = self.shape[:2] if len(self.shape) > 1 else (1, self.shape[0])
        known: dict[str | int, int] = {1: 1, "R": rows, "C": columns}
        return known.get(symbols[0], self.shape[-1]), known.get(symbols[1], self.shape[-1])

    def _public(self, symbols: tuple[str | int, str | int]) -> tuple[int, ...]:
        """The shape in which a caller passes it."""
        if len(self.shape) == 1 and symbols == ("R", "C"):
            return self.shape
        return tuple(n for s, n in zip(symbols, self._extents(symbols), strict=True) if s != 1)


def _sample(rng: np.random.Generator, rows: int, columns: int, dtype: str, domain: str) -> Array:
    """Random numbers that an input takes."""
    if dtype in HALF:
        return _sample(rng, rows, columns, "float32", domain).astype(numpy_dtype(dtype))
    kind: Any = np.dtype(dtype).type
    if domain == "positive":
        return np.asarray(rng.random((rows, columns), kind) + kind(0.1))
    if domain == "unit":
        return np.asarray(rng.random((rows, columns), kind))
    values = rng.standard_normal((rows, columns), kind)
    if domain in ("simplex", "log_simplex"):
        np.exp(values, out=values)
        values /= values.sum(axis=-1, keepdims=True)
    if domain == "log_simplex":
        np.log(values, out=values)
    return np.asarray(values)


def _has_matrix(kernel: Kernel) -> bool:
    return any(Matrix in i.kinds for i in kernel.declaration.inputs.values())


def _has_classes(kernel: Kernel) -> bool:
    return any(Index in i.kinds for i in kernel.declaration.inputs.values())


def _by_rows(kernel: Kernel) -> bool:
    return kernel.has_axis or _has_classes(kernel) or kernel.declaration.span is not None


def directions(kernel: Kernel) -> tuple[str, ...]:
    """The directions in which a kernel is measured.

    A loss, whose result is one number, is measured as it is trained with: value and gradient in one pass. A layer's
    backward is other products than its forward, with no ceiling of their own measured, and is left out.
    """
    d = kernel.declaration
    if d.backward is None:
        return ("forward",)
    outputs = prepare.example_task(kernel, "float64", "forward", {}, backend="numpy").shapes
    if all(outputs[n] == (1, 1) for n in d.outputs if n in outputs):
        return ("value_and_grad",)
    return ("forward",) if _has_matrix(kernel) else ("forward", "backward")


def cases(
    kernels: Iterable[Kernel],
    *,
    quick: bool = False,
    dtypes: Iterable[str] = ("float32",),
    shape: tuple[int, ...] | None = None,
) -> list[Case]:
    """The cases of some kernels; `quick` is the part of them that takes about a minute for all built-in kernels.

    `shape` takes the place of the kernels' own.

    Examples
    --------
    >>> import xpnn
    >>> [case.size for case in cases([xpnn.softmax], quick=True) if case.direction == "forward"]
    ['64x10', '4096x1000']
    """
    found = []
    for kernel in kernels:
        table: Any = HIDDEN if kernel.declaration.span is not None else ROWS if _by_rows(kernel) else FLAT
        if _has_matrix(kernel):
            table = HEADS if _has_classes(kernel) else PRODUCTS
        if shape is not None:
            table = ((shape, "asked for", True),)
        for direction in directions(kernel):
            sizes = [(size, source) for size, source, short in table if short or not quick]
            found += [Case(kernel, direction, size, dtype, source) for size, source in sizes for dtype in dtypes]
    return found
