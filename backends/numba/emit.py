"""From a loop program to the text of a Numba module.

One stage becomes one serial function over a range of blocks; `call` runs the stages in order, each shared out over threads,
and adds up what they leave in fixed order. Rows are cut into `Lanes`, or many short ones share them: `loops`, `tile`.
Reductions split a row into phases:

    phase 0   max over the columns
    phase 1   e = exp(x - max), stored in the output's own row, and its sum
    phase 2   e / sum

A value that is dear to compute and needed in two phases is kept in the row of an output that is written later.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection
from dataclasses import dataclass

from xpnn.backends.numba.expression import Context, Scalars
from xpnn.backends.numba.loops import LoopWriter
from xpnn.backends.numba.stage import StageWriter, has_rows
from xpnn.backends.numba.tile import TileWriter
from xpnn.backends.phases import DEAR
from xpnn.backends.program import Node, Program, stages, substitute, walk
from xpnn.backends.task import HALF

_HALVES = ("", "_float16", "_bfloat16")
# what emitted code may import from modules of xpnn.backends.numba
# fmt: off
_VOCABULARY = {
    "crest": [f"crest{half}" for half in _HALVES],
    "lanes": [
        "absolute", "columns", "divide", "doubled", "erf", "erfc", "exp", "expm1", "exp_nonpositive", "floor", "keep", "least",
        "log", "log1p", "logical_and", "logical_not", "logical_or", "maximum", "minimum", "negative", "peak", "spread", "sqrt",
        "tanh", "to_float", "to_int", "total", "where",
    ],
    "memory": [
        "apart", "cut", "desk", "fetch", "fetch_to_write", "hold", "room", "settle", *(f"stream{half}" for half in _HALVES),
    ],
    "rows": [
        "column", "fits", "row",
        *(n + half for n in ("at", "load", "put", "store") for half in _HALVES),
    ],
    "tiles": [
        "anywhere", "first_of", "gather", "gathered", "line", "nothing", "pick_line", "rounded", "set_line",
        *(
            n + half
            for n in ("cut_out", "load_rows", "pick", "put_back", "store_rows", "turn", "turn_back")
            for half in _HALVES
        ),
    ],
}
# fmt: on
_SUMS = {"sum_rows": "total", "column_sum": "sums"}
_CODES = {"float": "f", "int": "i"}  # of launch.signature
SERIAL_BELOW = 200_000  # units of work, about 0.06 ns each, that take less time than to wake a second thread


@dataclass(frozen=True)
class Emitted:
    """A module's text, and how to call its `call(runner, threads, *inputs, *outputs, *numbers)`.

    `index` is the order in which `call` checks its index inputs: it returns -1, or check number + 8 * row. Given no threads, it
    looks at the arrays first, and does nothing where it returns -3, for arrays that do not fit, or -2, for `serial_below`
    elements and more.

    `unsafe` holds the pairs (output, input) that must not share memory. `across` is an array with the columns of rows that have
    values of their own: up to `most_short` of them a short form is chosen, beyond this one; "" and 0 if there is one form.
    """

    text: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    numbers: tuple[str, ...]
    index: tuple[str, ...]
    unsafe: frozenset[tuple[str, str]]
    serial_below: int
    across: str
    most_short: int


def emit(
    program: Program, dtype: str, wide: Collection[str], banner: str, short: bool = False, planes: bool = False
) -> Emitted:
    """Write the module that computes a loop program; in a `short` form, for rows of few columns; for arrays as `planes`.

    Half precision is computed in float32; of such a program's arrays, those named in `wide` are stored in float32 too.
    """
    safe = _safe_names(program)
    renamed = _renamed(program, safe)
    arrays = program.inputs | program.outputs
    halves = {safe[n]: dtype for n, node in arrays.items() if dtype in HALF and node.dtype == "float" and n not in wide}
    context = Context(renamed, "float32" if dtype in HALF else dtype, halves, planes)
    plan = stages(renamed)
    sums = {s: f"{_SUMS[s.op]}{k}" for k, s in enumerate(s for stage in plan for s in stage.sums)}
    writers: list[StageWriter] = []
    for k, stage in enumerate(plan):
        if (planes and 1 not in stage.shape) or (short and has_rows(stage)) or (stage.shape[0] != 1 == stage.shape[1]):
            writers.append(TileWriter(context, stage, f"stage{k}", sums, long=not short))
        else:
            writers.append(LoopWriter(context, stage, f"stage{k}", sums))
    nodes = walk(program.outputs.values())
    full = [n.op for n in nodes if 1 not in n.shape]
    work = 2 + 3 * sum(op in DEAR for op in full) + full.count("div")  # for each element
    call = _call(context, writers, sums, SERIAL_BELOW // work)
    functions = ["\n".join(lines) for lines in (*(f for w in writers for f in w.write()), call)]
    text = "\n\n\n".join([_header(context, banner, "".join(functions)), *functions]) + "\n"
    own = {new: old for old, new in safe.items()}
    unsafe = frozenset((own[a], own[b]) for a, b in context.unsafe)
    along = {stage.shape[1] for stage in plan if has_rows(stage)}
    across = next((n for n, node in arrays.items() if along == {node.shape[1]}), "")
    # turning a tile costs as much as all that is done with it, unless something dear is
    most_short = 0 if not across else context.lanes * (4 if any(op in DEAR for op in full) else 1)
    p = program
    names = (tuple(p.inputs), tuple(p.outputs), tuple(p.options), tuple(p.index))
    return Emitted(text, *names, unsafe, SERIAL_BELOW // work, across, most_short)


# names that emitted code uses itself; none of them ends with an underscore
_OURS = re.compile(
    r"[bfijknCRW]|np|njit|types|real|runner|threads|call|invoke|launch|signature|first|last|blocks?|start|stop|pieces|range|"
    r"added|hot|whole|rest|pending|streamed|kept_rows|pitch|tall|tiles|plane|per|many|place|left|which|half|piece|end|index|"
    + "|".join(name for names in _VOCABULARY.values() for name in names)
    + r"|\w*_([bij]|\d+|parts|parts_b|lanes|lanes_all|row|all|next|kept|part|before|finish|tiles?|given)"
    + r"|(stage|number|total|sums|kept|t)\d+"
)


def _safe_names(program: Program) -> dict[str, str]:
    """Names for a program's arrays and numbers that emitted code does not use itself."""
    given = (*program.inputs, *program.outputs, *program.options)
    safe: dict[str, str] = {}
    for name in given:
        new = name
        while _OURS.fullmatch(new) or new in {*safe.values(), *given} - {name}:
            new += "_"
        safe[name] = new
    return safe


def _renamed(program: Program, names: dict[str, str]) -> Program:
    leaves = (*program.inputs.values(), *program.options.values())
    new = {n: Node(n.op, (), n.shape, n.dtype, names[n.value]) for n in leaves}
    outputs = substitute(program.outputs.values(), new)
    return Program(
        program.name,
        {names[k]: new[v] for k, v in program.inputs.items()},
        {names[k]: new[v] for k, v in program.options.items()},
        {names[k]: v for k, v in zip(program.outputs, outputs, strict=True)},
        {names[k]: names.get(v, v) if v else v for k, v in program.index.items()},
        derived={names[k]: substitute([v], new)[0] for k, v in program.derived.items()},
    )


def _header(context: Context, banner: str, body: str) -> str:
    imports = []
    for module, names in _VOCABULARY.items():
        if used := sorted(n for n in names if re.search(rf"\b{n}\(", body)):
            imports.append(f"from xpnn.backends.numba.{module} import {', '.join(used)}")
    launching = [n for n in ("invoke", "launch", "signature") if re.search(rf"\b{n}\(", body)]
    return "\n".join(
        [
            f'"""{banner}',
            "",
            *(f"    {line}" for line in context.program.text().splitlines()),
            '"""',
            "",
            "import numpy as np",
            "from numba import njit, types",
            "",
            *sorted([*imports, f"from xpnn.backends.numba.launch import {', '.join(launching)}"]),
            "",
            f"f, real = np.{context.dtype}, types.{context.dtype}",
            f"W = {context.lanes}  # lanes",
        ]
    )


def _call(context: Context, writers: list[StageWriter], sums: dict[Node, str], serial_below: int) -> list[str]:
    """The entry point: check the indices, run the stages, finish the sums, write the numbers."""
    p = context.program
    arrays = p.inputs | p.outputs
    narrow = [name for name, n in arrays.items() if n.shape[1] == 1]
    codes = ["i", "i"]
    for name, n in arrays.items():
        element = "h" if name in context.halves else _CODES[n.dtype]
        axes = 1 if name in narrow else 3 if context.in_planes(n) else 2
        codes.append(f"{'r' if name in p.inputs else 'w'}{axes}{element}")
    codes += [_CODES[n.dtype] for n in p.options.values()]
    body = [f"{name} = column({name}_given)" for name in narrow]
    body += [f"{context.extent(s)} = {source}" for s, source in context.extents.items()]
    if context.planes:
        body.append(f"plane = {context.plane}")
    else:
        body += ["if threads == 0:", *(f"    {line}" for line in _look(context, writers, serial_below)), "    threads = 1"]
    for k, (name, exempt) in enumerate(p.index.items()):
        columns = next(context.extent(n.shape[1]) for n in p.inputs.values() if n.shape[1] != 1)
        test = f"logical_or(index < 0, index >= {columns})"
        if exempt in p.options:
            test = f"logical_and({test}, index != {exempt})"
        body += [
            f"for i in range(0, {name}.shape[0], W):",
            f"    index = load_rows(f(0.0), {name}, i, {name}.shape[0] - i)",
            f"    if anywhere({test}):",
            "        for j in range(W):",
            f"            index = load_rows(f(0.0), {name}, i + j, 1)",
            f"            if anywhere({test}):",
            f"                return {k} + 8 * (i + j)",
        ]
    scalars = Scalars(context, sums)
    for writer in writers:
        body += writer.launch(scalars)
        for s in writer.stage.sums:
            body += writer.finish(s)
    for name, node in p.outputs.items():
        if node.shape == (1, 1):
            lines, value = scalars.value(node)
            body += [*lines, context.put(name, "0", "0", value)]
    return [
        f'@njit(signature(real, "{" ".join(codes)}"), nogil=True, error_model="numpy", cache=True)',
        f"def call({', '.join(['runner', 'threads', *(f'{n}_given' if n in narrow else n for n in arrays), *p.options])}):",
        *(f"    {line}" for line in [*body, "return -1"]),
    ]


def _look(context: Context, writers: list[StageWriter], serial_below: int) -> list[str]:
    """Whether the arrays are such that the loops may run over them, and few enough elements for one thread."""
    p = context.program
    shapes = [context.extent(symbol) for n in (*p.outputs.values(), *p.inputs.values()) for symbol in n.shape]
    pairs = list(itertools.product(p.outputs, p.inputs))
    same = sum(
        1 << k for k, (o, i) in enumerate(pairs) if (o, i) not in context.unsafe and p.outputs[o].shape == p.inputs[i].shape
    )
    written, read, numbers = (f"({''.join(f'{name}, ' for name in names)})" for names in (p.outputs, p.inputs, shapes))
    grids = dict.fromkeys(" * ".join(context.extent(s) for s in w.stage.shape if s != 1) for w in writers)
    large = " or ".join(f"{grid} >= {serial_below}" for grid in grids if grid) or "False"
    return [
        f"if not fits({written}, {read}, {numbers}, {same}):",
        "    return -3",
        f"if {large}:",
        "    return -2",
    ]
