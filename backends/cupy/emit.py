"""A loop program as one CUDA C++ translation unit, and the launches that run it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from xpnn.backends.cupy.expression import Context, identifier, safe_names
from xpnn.backends.cupy.kernel import Launch, Sizes
from xpnn.backends.cupy.passes import plan
from xpnn.backends.cupy.regime import Device, roomier
from xpnn.backends.cupy.rowwise import row_launches
from xpnn.backends.cupy.sums import ColumnKernel, ValuesKernel
from xpnn.backends.program import Program

DTYPES = {"float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float", "float64": "double"}
INTEGERS = {
    "int8": "signed char", "int16": "short", "int32": "int", "int64": "long long",
    "uint8": "unsigned char", "uint16": "unsigned short", "uint32": "unsigned int", "uint64": "unsigned long long",
}  # fmt: skip
OPTIONS = ("--fmad=false",)  # a product and a sum are rounded as they are written, in every regime alike

_HALF = {
    "__half": """#include <cuda_fp16.h>
using T = __half;
using real = float;
__device__ __forceinline__ real to_real(T v) { return __half2float(v); }
__device__ __forceinline__ void from_real(T& to, real v) { to = __float2half_rn(v); }""",
    "__nv_bfloat16": """#include <cuda_bf16.h>
using T = __nv_bfloat16;
using real = float;
__device__ __forceinline__ real to_real(T v) { return __bfloat162float(v); }
__device__ __forceinline__ void from_real(T& to, real v) { to = __float2bfloat16_rn(v); }""",
}

_NUMBERS = {
    "float": """#define INF __int_as_float(0x7f800000)
#define NOT_A_NUMBER __int_as_float(0x7fc00000)
#define HUGE_DIVISOR 0x1p100
#define SHIFT 0x1p64""",
    "double": """#define INF __longlong_as_double(0x7ff0000000000000ll)
#define NOT_A_NUMBER __longlong_as_double(0x7ff8000000000000ll)
#define HUGE_DIVISOR 0x1p900
#define SHIFT 0x1p512""",
}
_PARTS = {  # the library's files, and what shows that a kernel needs them
    "staged": ("_staged<", "_each<", "alike("),
    "cluster": ("cluster_rank(",),
    "sums": ("over_block<", "add_parts(", "down<"),
}


@dataclass(frozen=True)
class Emitted:
    """The kernels of a loop program, and how to run them.

    `unsafe` holds the pairs (output, input) that must not share memory. `scratch` are the sizes, in bytes, of the arrays
    that only these launches see.
    """

    program: Program
    dtype: str
    wide: bool
    launches: tuple[Launch, ...]
    scratch: dict[str, int]
    unsafe: frozenset[tuple[str, str]]

    @property
    def text(self) -> str:
        """A self-contained translation unit."""
        return unit([self])


def emit(
    program: Program,
    dtype: str,
    integers: dict[str, str],
    wide: set[str],
    sizes: dict[str, int],
    staged: bool,
    device: Device,
    number: int = 0,
    limits: Mapping[str, int] | None = None,
) -> Emitted:
    """Write the kernels of a loop program.

    Parameters
    ----------
    dtype
        Of the floating arrays; what is computed in is float64 for float64, else float32.
    integers
        The dtypes of the integer inputs.
    wide
        Inputs and outputs that are of what is computed in, not of `dtype`.
    sizes
        The numbers that the extents' symbols stand for.
    staged
        Whether rows may start anywhere; else all start on 16-byte borders.
    number
        Of the first kernel, which its name ends with.
    limits
        For kernels by name, how many blocks of them a multiprocessor is to hold at most.
    """
    todo = plan(program)
    names = safe_names([*program.inputs, *program.outputs, *program.options]) | {n: n[1:] for n in todo.scratch}
    types = dict.fromkeys((*program.inputs, *program.outputs), "T") | dict.fromkeys((*todo.scratch, *wide), "real")
    types |= {n: INTEGERS[integers[n]] for n in integers}
    types |= {n: INTEGERS["int64"] for n, node in program.outputs.items() if node.dtype == "int"}
    context = Context(dtype, types, names, any(v > 2**30 for v in sizes.values()), sizes)
    scratch = {n: context.real * _extent(a, sizes) * _extent(b, sizes) for n, (a, b) in todo.scratch.items()}
    launches: list[Launch] = []
    unsafe = todo.unsafe()
    for k, p in enumerate(todo.passes):
        grid = Sizes(_extent(p.shape[0], sizes), _extent(p.shape[1], sizes))
        name = f"{identifier(program.name)}_{number + k}"
        if p.kind == "rows":
            made = row_launches(context, p, name, grid, staged, device, limits or {})
            if made[0].regime.name == "split":  # one block writes while another one still gathers
                unsafe |= {(o, i) for o in p.stores for i in p.gathered()}
        elif p.kind == "columns":
            made = ColumnKernel(context, p, name, grid).write(staged)
        else:
            made = ValuesKernel(context, p, name, grid).write()
        launches += made
    for launch in launches:
        scratch |= launch.scratch
    own = frozenset((a, b) for a, b in unsafe if a in program.outputs and b in program.inputs)
    return Emitted(program, dtype, context.wide, tuple(launches), scratch, own)


def settle(write: Callable[[Mapping[str, int]], Emitted], spilling: Callable[[Emitted], Iterable[str]]) -> Emitted:
    """Give the threads of kernels whose registers do not suffice more of them, until none spills or none can have more.

    `write` emits with limits; `spilling` compiles, and names the kernels that spill.
    """
    limits: dict[str, int] = {}
    while True:
        emitted = write(limits)
        spilt = set(spilling(emitted))
        more = {x.function: roomier(x.regime) for x in emitted.launches if x.function in spilt}
        if not any(more.values()):
            return emitted
        limits |= {name: resident for name, resident in more.items() if resident}


def _extent(symbol: str | int, sizes: dict[str, int]) -> int:
    return 1 if symbol == 1 else sizes[str(symbol)]


def unit(parts: list[Emitted]) -> str:
    """The kernels of some loop programs of one dtype as one translation unit."""
    kernels = "\n\n".join(launch.text for e in parts for launch in e.launches)
    lines = []
    for e in parts:
        lines += [f"// xpnn: {e.program.name} ({', '.join(e.program.outputs)}), {e.dtype}. Emitted from this program:", "//"]
        lines += [f"//   {line}" for line in e.program.text().splitlines()]
    t = DTYPES[parts[0].dtype]
    lines += [
        f"// Compile with {' '.join(OPTIONS)}.",
        _HALF.get(t) or f"using T = {t};\nusing real = {t};",
        f"using column_t = {'long long' if any(e.wide for e in parts) else 'int'};",
        "__device__ __forceinline__ real to_real(real v) { return v; }",
        "__device__ __forceinline__ void from_real(real& to, real v) { to = v; }",
        "__device__ __forceinline__ void from_real(long long& to, long long v) { to = v; }",
        _NUMBERS["double" if t == "double" else "float"],
    ]
    used = [snippet(f"{name}.cuh") for name, words in _PARTS.items() if any(word in kernels for word in words)]
    return "\n".join(["\n".join(lines) + "\n", snippet("prelude.cuh"), *used, kernels]) + "\n"


@cache
def snippet(name: str) -> str:
    """A part of the library that emitted kernels are made of."""
    return (files("xpnn.backends.cupy") / name).read_text(encoding="utf-8")
