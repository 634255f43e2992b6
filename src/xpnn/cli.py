"""The command line: `xpnn info`, `xpnn bench`, `xpnn show`, `xpnn parity` and `xpnn plot`."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import xpnn
from xpnn.backends import choice
from xpnn.backends.kernel import Kernel, registry
from xpnn.backends.numba import pool

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

BUSY = 0.5  # processors that other programs may keep busy before a timing is called disturbed
WIDTH = 200  # of tables that go to a file or a pipe
USUAL = tuple(name for name in choice.NAMES if name not in ("auto", "dask"))  # Dask's blocks run Numba's loops, and take long
BACKENDS = (*(name for name in choice.NAMES if name != "auto"), *choice.installed())
VERDICTS = {"ok": "green", "breach": "bold red", "blind": "bold yellow"}

_import = click.option(
    "--import", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE.py",
    help="Run this file first: the @xpnn.kernel functions it defines join the built-in ones.",
)  # fmt: skip
_kernels = click.option("--kernel", "names", multiple=True, metavar="NAME", help="Only this kernel; may be repeated.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(xpnn.__version__, prog_name="xpnn")
def main() -> None:
    """Neural-network kernels, written once, run composed or fused."""
    try:  # the environment's settings
        choice.current()
        pool.count()
    except ValueError as error:
        raise click.ClickException(str(error)) from error


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def info(as_json: bool) -> None:
    """Say what runs here: versions, processor, threads, backends."""
    from xpnn.backends.folder import folder
    from xpnn.benchmarks import machine

    found = machine.describe() | {"cache": str(folder())}
    states = {name: _available(name) for name in BACKENDS}
    found["backends"] = states
    found["chosen"] = choice.current()
    libraries = {"numpy.ndarray": "numpy", "cupy.ndarray": "cupy", "dask.array.Array": "dask", "any other array": ""}
    found["auto"] = {kind: choice.AUTO.get(library, "array-api") for kind, library in libraries.items()}
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("processor", f"{found['cpu']} ({found['architecture']}), {found['cores']} cores")
    table.add_row("system", found["system"])
    table.add_row("threads", f"{found['threads']}, threading layer {found['threading_layer']}")
    table.add_row("cache", found["cache"])
    table.add_row("versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    if found["commit"]:
        table.add_row("commit", found["commit"])
    table.add_row("backends", "\n".join(f"{name}: {state}" for name, state in states.items()))
    table.add_row("in force", found["chosen"])
    table.add_row("auto picks", "\n".join(f"{name} for {kind}" for kind, name in found["auto"].items()))
    _console().print(table)


@main.command()
@click.option("--quick", is_flag=True, help="A part of the cases, in about a minute.")
@_kernels
@click.option("--peers", is_flag=True, help="Also time SciPy, numexpr, PyTorch, torch.compile and jax.jit, where installed.")
@click.option("--dtype", "dtypes", multiple=True, default=("float32",), show_default=True,
              type=click.Choice(["float16", "bfloat16", "float32", "float64"]), help="May be repeated.")  # fmt: skip
@click.option("--shape", metavar="RxC", help="Instead of the usual shapes: 2048x32000; 1048576; 2048x512x64000 for a layer.")
@click.option("--json", "to", type=click.Path(allow_dash=True, dir_okay=False, writable=True), metavar="FILE",
              help='Write medians, machine and versions to FILE; "-" prints them instead of the table.')  # fmt: skip
@click.option("--html", "page", type=click.Path(dir_okay=False, writable=True, path_type=Path), metavar="FILE",
              help="Write one page with charts: limits, rivals, sizes, threads, memory.")  # fmt: skip
@click.option("--against", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
              help="Also compare with an earlier run, which --json wrote.")  # fmt: skip
@_import
def bench(
    quick: bool,
    names: tuple[str, ...],
    peers: bool,
    dtypes: tuple[str, ...],
    shape: str | None,
    to: str | None,
    page: Path | None,
    against: Path | None,
    file: Path | None,
) -> None:
    """Time the fused kernels beside their formula composed on NumPy, and beside what memory and arithmetic allow.

    Every contender's result is compared before it is timed. Close other programs: they share the processor.
    """
    from xpnn.benchmarks import ceiling, machine, report, run
    from xpnn.benchmarks.cases import cases
    from xpnn.benchmarks.peers import PEERS, WrongResultError

    for option, path in (("--json", to), ("--html", page)):
        if path not in (None, "-") and not Path(path).parent.is_dir():  # said now, not after minutes
            raise click.UsageError(f"{option} {path}: there is no folder {Path(path).parent}")
    before = json.loads(against.read_text(encoding="utf-8")) if against is not None else None
    extents = None
    if shape is not None:
        if not all(n.isdecimal() and int(n) for n in shape.split("x")):
            raise click.UsageError(f"--shape {shape}: expected whole numbers with x between them, such as 2048x32000")
        extents = tuple(map(int, shape.split("x")))
    found = cases(_chosen(names, file), quick=quick, dtypes=dtypes, shape=extents)
    if wrong := next((c.group for c in found if len(c.shape) != c.dimensions), None):
        raise click.UsageError(f"--shape {shape}: not of as many numbers as the shapes of {wrong}; choose kernels by --kernel")
    seconds = run.QUICK if quick else run.FULL
    load = machine.load()
    results = []
    with _progress() as progress:
        task = progress.add_task("", total=len(found))
        for case in found:
            progress.update(task, description=f"{case.group} {case.size}")
            try:
                results.append(run.measure(case, others=PEERS if peers else (), seconds=seconds))
            except WrongResultError as error:
                raise click.ClickException(str(error)) from error
            progress.advance(task)
            if progress.disable:  # no bar: a line for each case, so that a log tells how far it is
                click.echo(f"{len(results)}/{len(found)} {report.line(results[-1])}", err=True)
        rates, scaling = {}, {}
        if page is not None or to is not None:
            progress.update(task, description="threads")
            rates = ceiling.rates()
            scaling = {r.case.name: run.scaling(r.case) for r in results if r.timings and run.is_scaled(r.case)}
    found_all = report.document(results, load, rates, scaling)
    if to != "-":
        console = _console()
        console.print(report.table(results))
        console.print(report.memory(results))
        for line in report.summary(results):
            console.print(line, style="yellow" if "slower" in line or "not measured" in line else "", highlight=False)
        if load > BUSY:
            console.print(f"load before the run was {load:.1f}: other programs disturbed these timings", style="red")
        if before is not None:
            console.print(report.changes(found_all, before))
    if page is not None:
        from xpnn.benchmarks.page import page_of

        page.write_text(page_of(found_all), encoding="utf-8")
        click.echo(f"charts: {page.resolve()}", err=to == "-")
    if to is not None:
        text = json.dumps(found_all, indent=1)
        with click.open_file(to, "w", encoding="utf-8") as stream:
            stream.write(text + "\n")


@main.command()
@click.argument("kernel")
@click.option("--backend", type=click.Choice(BACKENDS), default="numba", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--direction", type=click.Choice(["forward", "backward", "value_and_grad"]), default="forward", show_default=True)
@click.option("--shape", default="4096x4096", show_default=True, metavar="ROWSxCOLUMNS", help="For cupy: of the arrays.")
@click.option("--plan", is_flag=True, help="For cupy: also what each kernel takes and moves. Without a GPU: for an H100.")
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE",
              help="An option, such as reduction=sum or activation=relu; an input that may be left out is passed with "
              "any value, such as weight=1. May be repeated.")  # fmt: skip
@_import
def show(
    kernel: str,
    backend: str,
    dtype: str,
    direction: str,
    shape: str,
    plan: bool,
    options: tuple[str, ...],
    file: Path | None,
) -> None:
    """Print the code that a backend runs for KERNEL."""
    (chosen,) = _chosen((kernel,), file)
    values = dict(_option(text) for text in options)
    rows, _, columns = shape.partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise click.UsageError(f"--shape {shape}: expected ROWSxCOLUMNS, such as 8192x128256")
    if plan and backend != "cupy":
        raise click.UsageError("--plan is for --backend cupy")
    extents = int(rows), int(columns)
    try:
        text = chosen.source(backend=backend, dtype=dtype, direction=direction, shape=extents, **values)
        if sys.stdout.isatty():
            from rich.syntax import Syntax

            _console().print(Syntax(text, "cuda" if backend == "cupy" else "python", background_color="default"))
        else:
            click.echo(text)
        if plan:
            _plan_table(chosen, dtype, direction, extents, values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error


def _plan_table(kernel: Kernel, dtype: str, direction: str, shape: tuple[int, int], options: dict[str, Any]) -> None:
    """The launches of a direction: regime, threads, registers, bytes moved."""
    from rich.table import Table

    from xpnn.backends.cupy import inspect, machine
    from xpnn.backends.cupy.regime import WHAT
    from xpnn.backends.prepare import cuda

    device, here = machine.assumed(), machine.present()
    name = "this GPU" if here else "an H100 (there is no GPU here)"
    table = Table(title=f"for {name}, compute capability {device.capability / 10:.1f}")
    for heading in ("launch", "regime", "blocks", "threads", "registers", "shared, bytes", "bytes read", "written"):
        table.add_column(heading, justify="left" if heading in ("launch", "regime") else "right")
    elements = shape[0] * shape[1]
    moved = [0, 0]
    for part in cuda(kernel, dtype, direction, shape, options, device):
        if isinstance(part, str):
            table.add_row(part)
            continue
        compiled = inspect.compile_for(part.text, device.capability) if inspect.available() else None
        for launch in part.launches:
            moved = [a + b for a, b in zip(moved, launch.moves, strict=True)]
            bytes_ = [f"{b / elements:.3g}" for b in launch.moves]
            registers = "?" if compiled is None else f"{compiled.registers[launch.function]}"
            blocks = "x".join(str(n) for n in launch.blocks if n > 1) or "1"
            cells = [blocks, str(launch.threads), registers, str(launch.shared)]
            table.add_row(launch.function, f"{launch.regime.name}: {WHAT[launch.regime.name]}", *cells, *bytes_)
    table.caption = (
        f"bytes per element of {shape[0]}x{shape[1]}: {moved[0] / elements:.4g} read, {moved[1] / elements:.4g} written"
    )
    if not inspect.available():
        table.caption += "; registers: known where CuPy is installed"
    _console().print(table)


@main.command()
@_kernels
@click.option("--backend", "backends", multiple=True, type=click.Choice(BACKENDS), help="Only this backend; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@_import
@click.pass_context
def parity(context: click.Context, names: tuple[str, ...], backends: tuple[str, ...], as_json: bool, file: Path | None) -> None:
    """Measure every kernel's error on every backend against its bound; exit with 1 on a breach.

    Errors are in units of the last place. A check that would not notice a wrong result is "blind", and fails too.
    """
    kernels = _chosen(names, file)
    asked = list(backends) or [name for name in USUAL if _available(name).startswith("available")]
    for name in asked:
        if not (state := _available(name)).startswith("available"):
            raise click.ClickException(f"backend {name} is {state}")
    rows: list[dict[str, Any]] = []
    with _progress() as progress:
        task = progress.add_task("", total=len(kernels))
        for kernel in kernels:
            progress.update(task, description=kernel.__name__)
            try:
                for row in xpnn.testing.parity_rows([kernel], asked):
                    rows.append(row)
                    seen = " ".join(str(row[n]) for n in ("kernel", "variant", "backend", "dtype", "direction"))
                    progress.update(task, description=f"{seen}: {row['verdict']}")
            except xpnn.BackendError as error:
                raise click.ClickException(f"{kernel.__name__}: {error}") from error
            progress.advance(task)
    bad = [row for row in rows if row["verdict"] != "ok"]
    if as_json:
        click.echo(json.dumps(rows, indent=1, default=str))
    else:
        _parity_table(rows)
        click.echo(f"{len(rows) - len(bad)} of {len(rows)} within their bounds")
    context.exit(1 if bad else 0)


def _parity_table(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table()
    for heading in ("kernel", "variant", "backend", "place", "dtype", "direction"):
        table.add_column(heading)
    table.add_column("error, ULP", justify="right")
    table.add_column("bound, ULP", justify="right")
    table.add_column("verdict")
    table.add_column("truth")
    for row in rows:
        style = VERDICTS.get(row["verdict"], "")
        cells = [str(row[n]) for n in ("kernel", "variant", "backend", "place", "dtype", "direction")]
        numbers = [f"{row[n]:.3g}" for n in ("error_ulp", "bound_ulp")]
        table.add_row(*cells, *numbers, f"[{style}]{row['verdict']}[/]" if style else row["verdict"], str(row["truth"]))
    _console().print(table)


@main.command()
@click.argument("to", metavar="FILE", type=click.Path(dir_okay=False, writable=True, path_type=Path))
@_kernels
@_import
def plot(to: Path, names: tuple[str, ...], file: Path | None) -> None:
    """Draw activations and their derivatives side by side into FILE, a .png or .svg.

    Each comes with its formula, its range, the largest slope, and the parts where it saturates. Drawn is every kernel that is
    element-wise, of one real input, and has a backward.
    """
    from xpnn import curves
    from xpnn.plot import picture, write

    if to.suffix not in (".png", ".svg"):
        raise click.UsageError(f"{to}: expected a name that ends in .png or .svg")
    if not to.parent.is_dir():
        raise click.UsageError(f"{to}: there is no folder {to.parent}")
    kernels = _chosen(names, file)
    if not names:
        kernels = [kernel for kernel in kernels if curves.refusal(kernel) is None]
    with _progress() as progress:
        task = progress.add_task("", total=len(kernels))
        try:
            figure = picture(kernels, lambda kernel: progress.update(task, advance=1, description=kernel.__name__))
        except (ModuleNotFoundError, TypeError, xpnn.BackendError) as error:
            raise click.ClickException(str(error)) from error
        write(figure, to)


# --- shared by the commands ---------------------------------------------------------------------------------------


def _chosen(names: tuple[str, ...], file: Path | None) -> list[Kernel]:
    """The kernels asked for by name, or all of them, those of a user's file included."""
    if file is not None:
        _run(file)
    unknown = [name for name in names if name not in registry]
    if unknown:
        raise click.UsageError(f"no kernel is called {unknown[0]!r}; there are {', '.join(sorted(registry))}")
    return [registry[name] for name in names or registry]


def _run(file: Path) -> None:
    """Import a file that lies anywhere."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise click.UsageError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    known = dict(registry)
    sys.modules.setdefault(file.stem, module)  # where a formula's annotations and pickles are looked up
    sys.path.insert(0, str(file.resolve().parent))  # its neighbours, as if it were run
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise click.ClickException(f"{file}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    if registry == known:
        raise click.UsageError(f"{file} defines no @xpnn.kernel")


def _option(text: str) -> tuple[str, Any]:
    """`name=value`: a Python literal, a kernel's name, or else a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise click.UsageError(f"--option {text}: expected NAME=VALUE")
    if value in registry:
        return name, registry[value]
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _available(name: str) -> str:
    """Tell "available", also with what, or why a backend is not."""
    try:
        choice.backend(name)
    except Exception as error:
        return f"not available: {error}"
    if name != "cupy":
        return "available"
    from xpnn.backends.cupy import host

    state = host.state()
    if state == "host":
        return "available for checks: there is no GPU, the CPU runs the kernels in its place"
    return "available" if state == "GPU" else f"not available: {state}"


def _console() -> Console:
    """Standard output: as wide as the terminal, wide enough for every table elsewhere."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH, markup=False)  # "xpnn[cuda13]" is text


def _progress() -> Progress:
    """A progress bar on standard error, if somebody sees it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


if __name__ == "__main__":
    main()
