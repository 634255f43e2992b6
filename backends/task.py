"""What the public layer asks of a backend, and nothing more."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from xpnn.backends.declare import Declaration, trace
from xpnn.backends.kinds import Kind
from xpnn.backends.program import DType, Program
from xpnn.backends.recording import BranchError, SubsetError

HALF = {"float16", "bfloat16"}  # stored in 16 bits, computed in float32


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot serve; the message says why, and what to do."""


class OutOfRange(IndexError):
    """A column number outside its range, by row of the canonical array; the public layer words it for the caller."""

    def __init__(self, name: str, row: int, value: int, columns: int) -> None:
        super().__init__(f"{name}: got {value} in row {row}, expected 0 <= {name} < {columns}")
        self.name, self.row, self.value, self.columns = name, row, value, columns


@dataclass(frozen=True, eq=False)
class Task:
    """One thing to compute, for arrays of given kinds and dtypes: prepared once, executed often.

    Attributes
    ----------
    given
        Kind and dtype class of each array that will be passed: inputs, and for a backward outputs, saved values, cotangents.
    static
        The options that specialise.
    numbers
        The run-time options, with values of the right type.
    wanted
        The results: outputs, saved values, gradients ("d" + an input's name).
    library, dtype
        The arrays' library ("numpy", "torch", ...) and the name of their floating dtype.
    """

    declaration: Declaration
    given: dict[str, tuple[type[Kind], DType]]
    static: dict[str, Any]
    numbers: dict[str, Any]
    wanted: tuple[str, ...]
    library: str
    dtype: str

    def program(self) -> Program:
        """The traced program.

        Raises
        ------
        SubsetError
            Where a formula does what cannot be fused.
        """
        kinds = {n: k for n, (k, _) in self.given.items()}
        dtypes = {n: d for n, (_, d) in self.given.items()}
        return trace(self.declaration, kinds, dtypes, {**self.static, **self.numbers}, self.wanted)

    def wide(self, program: Program) -> set[str]:
        """The inputs and outputs of the program that are of what half precision is computed in."""
        arrays = program.inputs | program.outputs
        floats = {n: node for n, node in arrays.items() if node.dtype == "float"}
        return {n for n, node in floats.items() if self.declaration.is_wide(n, node.shape[1] == 1)}

    def fusible(self, name: str, library: str, arrays: str, dtypes: Collection[str]) -> Program:
        """The traced program, for a backend that fuses some dtypes of one library.

        Raises
        ------
        BackendError
            Where it cannot, with the reason and the remedy.
        """
        if self.library != library:
            raise BackendError(f"backend {name!r} takes {arrays} arrays, got {self.library} arrays; use backend 'auto'")
        if self.dtype not in dtypes:
            raise BackendError(f"backend {name!r} computes in {', '.join(dtypes)}, got {self.dtype}; convert, or use 'auto'")
        try:
            return self.program()
        except BranchError:
            raise
        except SubsetError as error:
            raise BackendError(f"{error}; that cannot be fused: use backend 'auto' or 'array-api'") from error


class Executable(Protocol):
    """Computes a task's results from canonical, two-dimensional arrays.

    `out` may hold arrays to write results into; what is returned under those names is then ignored if it is the same
    array, and copied otherwise. A column number outside its range raises OutOfRange before anything is written.
    """

    def __call__(
        self, xp: Any, arrays: Mapping[str, Any], numbers: Mapping[str, Any], out: Mapping[str, Any]
    ) -> dict[str, Any]: ...


class Backend(Protocol):
    """Where kernels run."""

    name: str

    def prepare(self, job: Task) -> Executable:
        """Make a task executable.

        Raises
        ------
        BackendError
            Where this backend cannot serve it, with the reason and the remedy.
        """
        ...
