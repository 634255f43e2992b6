"""Pages made of the installed package, in docs/reference: its kernels by family, its Python names, its command line.

A family is a module of `xpnn.kernels`. Whatever that package exports stands on its family's page, with its derivation, its
definition, and what the backends make of it.
"""

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
from pathlib import Path

from click.testing import CliRunner
from sphinx.ext.napoleon import NumpyDocstring

import xpnn
from xpnn import cli, kernels
from xpnn.backends import cupy, prepare
from xpnn.backends.cupy import inspect as compiler
from xpnn.backends.cupy import machine
from xpnn.backends.cupy.emit import Emitted
from xpnn.backends.cupy.regime import WHAT
from xpnn.backends.halves import Halves
from xpnn.backends.kernel import Kernel

SHAPE = (4096, 4096)  # of the arrays that CUDA code is shown for
INCLUDED = sorted(Path(cupy.__file__).parent.glob("*.cuh"))

KERNELS = """
Every kernel is called as the function that its page describes. Where it has a gradient, there are `~xpnn.Kernel.backward`,
`~xpnn.Kernel.vjp` and `~xpnn.Kernel.value_and_grad`; `xpnn.Kernel` lists the rest. ``out=`` names arrays for the
results, a tuple for several; each may be an input of the same shape and dtype. Shapes, dtypes and special values:
:doc:`/numerics`. Measured speed: :doc:`/speed`.
"""
EMITTED = """
Each kernel is shown as it is declared, and as it runs: the program that its formula leaves behind when it is traced, the Numba
loop that NumPy arrays go through, and the CUDA kernel for CuPy arrays, here for float32 arrays of 4096 rows and columns and
the options' defaults. ``xpnn show`` prints the same for other dtypes, shapes and options. CUDA kernels are written for an H100;
nothing on these pages was measured on one. The registers that they take are told where CuPy is installed.
"""


# --- pieces of reStructuredText ---------------------------------------------------------------------------------------


def heading(text, line):
    return f"{text}\n{line * len(text)}\n"


def indented(text):
    return textwrap.indent(text, "   ")


def code(text, language):
    text = text.strip("\n")
    return f".. code-block:: {language}\n\n{indented(text)}\n"


def folded(summary, *inner):
    """What is long, behind a line that opens it."""
    start, end = (f".. raw:: html\n\n   {tag}\n" for tag in (f"<details><summary>{summary}</summary>", "</details>"))
    return "\n".join((start, *inner, end))


def table(head, rows):
    rows = [[*row, *[""] * (len(head) - len(row))] for row in (head, *rows)]
    cells = (f"   {'* -' if k == 0 else '  -'} {cell}" for row in rows for k, cell in enumerate(row))
    return "\n".join((".. list-table::", "   :header-rows: 1", "", *cells, ""))


def prose(text):
    """Text of a docstring: a bar means an absolute value, not a substitution."""
    return re.sub(r"(?<!`)\|(?!`)", r"\\|", text)


def entry(names, signature, doc, config):
    """A function's part of the reference."""
    signatures = "\n   ".join(f"{name}{signature}" for name in names)
    lines = str(NumpyDocstring(prose(inspect.cleandoc(doc or "")), config))
    return f".. py:function:: {signatures}\n   :module: xpnn\n\n{indented(lines)}\n"


# --- kernels ----------------------------------------------------------------------------------------------------------


def families():
    """What `xpnn.kernels` exports, by module: names and object, in the order of their definitions."""
    found = {}
    for name, value in vars(kernels).items():
        if name in kernels.__all__:
            module = importlib.import_module(value.__module__)
            found.setdefault(module, {}).setdefault(id(value), (value, []))[1].append(name)
    order = {module: sorted(values.values(), key=lambda v: line_of(v[0])) for module, values in found.items()}
    return dict(sorted(order.items(), key=lambda item: item[0].__name__))


def kernel_of(value):
    """The kernel that an exported name stands for, or None; one whose caller has both arrays in one has it within."""
    value = value.kernel if isinstance(value, Halves) else value
    return value if isinstance(value, Kernel) else None


def formula(value):
    return found.forward_formula if (found := kernel_of(value)) else value


def line_of(value):
    return inspect.getsourcelines(formula(value))[1]


def short(module):
    return module.__name__.rpartition(".")[2]


def title(module):
    return short(module).replace("_", " ").capitalize()


def first_line(value):
    return prose(inspect.cleandoc(value.__doc__ or "").partition("\n")[0])


def overview():
    parts = [heading("Kernels", "="), KERNELS, EMITTED]
    for module, members in families().items():
        lines = "\n".join(f"`xpnn.{names[0]}`\n   {first_line(value)}\n" for value, names in members)
        parts += [f".. rubric:: :doc:`{title(module)} <kernels/{short(module)}>`\n", lines]
    pages = "\n".join(f"kernels/{short(module)}" for module in families())
    return "\n".join((*parts, f".. toctree::\n   :hidden:\n\n{indented(pages)}\n"))


def family(module, members, config):
    name = short(module)
    source = (
        f"Defined in `kernels/{name}.py <../../source/kernels/{name}.py.html>`_. What all have in common: :doc:`../kernels`; "
        "bounds of their errors: :doc:`/numerics`; how fast they are: :doc:`/speed`."
    )
    parts = [heading(title(module), "="), prose(inspect.cleandoc(module.__doc__ or "")) + "\n", source + "\n"]
    for value, names in members:
        parts += [heading(names[0], "-"), entry(names, inspect.signature(value), value.__doc__, config)]
        parts += kernel(value, config) if kernel_of(value) else [code(definition(value), "python")]
    return "\n".join(parts)


def kernel(value, config):
    parts, back = [], value.backward
    value = kernel_of(value)
    d = value.declaration
    if d.backward is not None:
        parts.append(entry([f"{value.__name__}.backward"], inspect.signature(back), d.backward.__doc__, config))
    parts += [".. rubric:: Definition\n"]
    parts += [code(definition(f), "python") for f in (d.forward, d.backward) if f is not None]
    if d.driver is not None:
        stages = " and ".join(f"`xpnn.{k.__name__}`" for k in d.driver.stages)
        return [*parts, f"It has no loop of its own: {stages} run by chunks of rows.\n"]
    for direction, words in directions(value).items():
        parts += [f".. rubric:: {words.capitalize()}, as it runs\n", *emitted(value, direction)]
    return parts


def definition(function):
    """The text of a function without its docstring, which stands above it."""
    lines = textwrap.dedent(inspect.getsource(function)).splitlines()
    node = ast.parse("\n".join(lines)).body[0]
    if ast.get_docstring(node) is not None:
        del lines[node.body[0].lineno - 1 : node.body[0].end_lineno]
    return "\n".join(lines)


def directions(value):
    """What a kernel can be asked for: the fused pass where its result is one number."""
    d = value.declaration
    found = {"forward": "forward"}
    if d.backward is not None:
        found["backward"] = "backward"
        shapes = prepare.example_task(value, "float32", "forward", {}, "numba").shapes
        if shapes[d.outputs[0]] == (1, 1):
            found["value_and_grad"] = "result and gradient in one pass"
    return found


def emitted(value, direction):
    """The program, the loop and the kernel of a direction."""
    options = usual(value, direction)
    loop = value.source(direction=direction, **options)
    cuda = value.source(backend="cupy", direction=direction, shape=SHAPE, **options)
    chosen = ", ".join(f"{n}={getattr(v, '__name__', repr(v))}" for n, v in options.items())
    parts = [f"With ``{chosen}``.\n"] if chosen else []
    if program := program_of(loop):
        parts.append(code(program, "text"))
    for path in INCLUDED:  # the same in every kernel that has it
        cuda = cuda.replace(path.read_text("utf-8").strip(), f"// ... backends/cupy/{path.name} ...")
    loop_lines, cuda_lines = (len(text.splitlines()) for text in (loop, cuda))
    return [
        *parts,
        folded(f"Numba loop, {loop_lines} lines", code(loop, "python")),
        folded(f"CUDA kernel, {cuda_lines} lines", plan(value, direction, options), code(cuda, "cuda")),
    ]


def usual(value, direction):
    """Default options; or, where products are all they leave to do, the first that leave more."""
    return next((v for v in ({}, *value.declaration.variants) if "def " in value.source(direction=direction, **v)), {})


def program_of(loop):
    """The programs that head the emitted loops, with the products before and after them."""
    heads = re.findall(r'^(# .*)$|^"""xpnn: .*\n\n([^"]*)"""$', loop, re.MULTILINE)
    return "\n".join(product or textwrap.dedent(program).strip() for product, program in heads)


def plan(value, direction, options):
    """What each launch takes and moves, as `xpnn show --plan` says."""
    device, known = machine.assumed(), compiler.available()
    rows = []
    for part in prepare.cuda(value, "float32", direction, SHAPE, options, device):
        if not isinstance(part, Emitted):
            rows.append((part,))
            continue
        registers = compiler.compile_for(part.text, device.capability).registers if known else {}
        for launch in part.launches:
            blocks = "×".join(str(n) for n in launch.blocks if n > 1) or "1"
            moved = (f"{n / (SHAPE[0] * SHAPE[1]):.3g}" for n in launch.moves)
            regime = f"{launch.regime.name}: {WHAT[launch.regime.name]}"
            used = [registers[launch.function]] if known else []
            rows.append((f"``{launch.function}``", regime, blocks, launch.threads, *moved, *used))
    head = ("launch", "regime", "blocks", "threads", "bytes read an element", "written", *["registers"] * known)
    return table(head, rows)


# --- Python names, command line ---------------------------------------------------------------------------------------


def python():
    parts = [heading("Python names", "="), "Those of `xpnn` other than its :doc:`kernels <kernels>`, and its modules.\n"]
    kinds = {}
    for name in sorted(set(xpnn.__all__) - set(kernels.__all__), key=str.lower):
        kinds.setdefault(kind_of(getattr(xpnn, name)), []).append(name)
    for kind in ("function", "class", "exception"):
        parts += [f".. auto{kind}:: xpnn.{name}\n" for name in kinds[kind]]
    for info in pkgutil.iter_modules(xpnn.__path__, "xpnn."):
        if is_public(info):
            parts += [heading(info.name, "-"), module(info.name)]
    return "\n".join(parts)


def kind_of(value):
    if inspect.isclass(value):
        return "exception" if issubclass(value, Exception) else "class"
    return "module" if inspect.ismodule(value) else "function"


def is_public(info):
    """Whether a module says what it exports, read without importing it."""
    return "__all__" in Path(info.module_finder.find_spec(info.name).origin).read_text("utf-8")


def module(name):
    try:
        found = importlib.import_module(name)
    except ModuleNotFoundError as error:
        return f"This page was built where it cannot be imported: {prose(str(error))}.\n"
    same = [n for n in found.__all__ if n not in vars(found)]  # made when asked for: the kernels, which have pages
    return f".. automodule:: {name}\n" + (f"   :exclude-members: {', '.join(same)}\n" if same else "")


def command_line():
    parts = [heading("Command line", "="), "What ``xpnn --help`` and the commands' own ``--help`` print.\n"]
    for words in ([], *([name] for name in cli.main.commands)):
        told = CliRunner().invoke(cli.main, [*words, "--help"], prog_name="xpnn", terminal_width=100, max_content_width=100)
        parts += [heading(" ".join(["xpnn", *words]), "-"), code(told.output, "text")]
    return "\n".join(parts)


# --- Sphinx -----------------------------------------------------------------------------------------------------------


def write(app):
    """Write the pages anew; those that did not change keep their time, so that they are not read again."""
    folder = Path(app.srcdir, "reference")
    pages = {"kernels": overview(), "python": python(), "command-line": command_line()}
    for m, members in families().items():
        pages[f"kernels/{short(m)}"] = family(m, members, app.config)
    for path in folder.rglob("*.rst"):
        if path.relative_to(folder).with_suffix("").as_posix() not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / f"{name}.rst"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")


def escape(app, what, name, obj, options, lines):
    lines[:] = [prose(line) for line in lines]


def setup(app):
    app.connect("builder-inited", write)
    app.connect("autodoc-process-docstring", escape, priority=400)  # before napoleon reads it
    return {"parallel_read_safe": True, "parallel_write_safe": True}
