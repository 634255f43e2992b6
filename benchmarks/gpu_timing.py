"""The sections of `gpu_check` that take time: how fast kernels are beside a copy and beside others, and what a call costs.

A sample is one call between two CUDA events. Before it, outside of them, the L2 cache is overwritten, and a kernel that
waits keeps the GPU busy until the host has queued the call: so what is timed is the GPU's work alone, from cold. Contenders
take turns. The ceiling is a copy that moves as many bytes as the case must, timed as one of the contenders.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import xpnn
from xpnn.backends.choice import use_backend
from xpnn.benchmarks.cases import Case
from xpnn.benchmarks.gpu_sections import Skip, attempt, dtypes, not_reached, require, watching
from xpnn.benchmarks.gpu_tools import as_torch, tools

if TYPE_CHECKING:
    from xpnn.benchmarks.gpu_check import Row, Run

Call = Callable[[], Any]

OURS, COPIES = "xpnn", ("copy, memcpy", "copy, kernel")
ROUNDS = 5, 60  # of all contenders, at least and at most
# two ways to compute the same may differ by this much of the largest value, and of the sum of magnitudes
TOLERANCE = {"float32": 2e-5, "float16": 8e-3, "bfloat16": 3e-2}
GOALS = ("float32", "bfloat16")
SHAPES = ((4096, 50257), (8192, 128256), (32768, 1024), (1024, 262144), (8192, 16384))
ACTIVATED = ((1 << 27,), (1 << 24,))
LAYERS = ((8192, 4096, 4096),)
DIRECTIONS = (
    (xpnn.cross_entropy, "value_and_grad"), (xpnn.softmax, "forward"), (xpnn.cross_entropy, "forward"),
    (xpnn.cross_entropy, "backward"), (xpnn.softmax, "backward"),
)  # fmt: skip


# --- the race -----------------------------------------------------------------------------------------------------------


def race(contenders: dict[str, Call], seconds: float) -> dict[str, list[float]]:
    """Seconds of single calls, contender by contender in turn, until the time is over but five times at least."""
    t = tools()
    cuda = t.cupy.cuda
    leads = {}
    for name, call in contenders.items():
        call()
        leads[name] = min(max(20_000, int(1.5e9 * min(_host_seconds(call) for _ in range(3))) + 20_000), 20_000_000)
    events = cuda.Event(), cuda.Event()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    least, most = ROUNDS
    end = time.perf_counter() + seconds
    for done in range(most):
        if done >= least and time.perf_counter() > end:
            break
        names = list(contenders)
        for name in names[done % len(names) :] + names[: done % len(names)]:
            t.flush()
            t.wait(leads[name])
            events[0].record()
            contenders[name]()
            events[1].record()
            events[1].synchronize()
            samples[name].append(cuda.get_elapsed_time(*events) * 1e-3)
    return samples


def _host_seconds(call: Call) -> float:
    """What the host takes to queue a call."""
    tools().cupy.cuda.runtime.deviceSynchronize()
    start = time.perf_counter()
    call()
    taken = time.perf_counter() - start
    tools().cupy.cuda.runtime.deviceSynchronize()
    return taken


def result_row(samples: dict[str, list[float]], size: int, limit: Sequence[str] = COPIES, what: str = "a copy") -> Row:
    """What a race comes to: medians, quartiles, GB/s, percent of the ceiling, others' times over ours.

    >>> row = result_row({"xpnn": [2e-3] * 3, "copy, kernel": [1e-3] * 3, "torch": [3e-3] * 3}, 10**9, ["copy, kernel"])
    >>> row["shown"]
    '2000.0 µs, 500 GB/s, 50.0 % of a copy, × torch 1.50'
    """
    seconds = {n: statistics.median(s) for n, s in samples.items()}
    ours = seconds[OURS]
    percent = 100 * min(seconds[n] for n in limit) / ours
    ratios = {n: s / ours for n, s in seconds.items() if n != OURS and n not in limit and n not in COPIES}
    shown = [f"{1e6 * ours:.1f} µs", f"{size / ours / 1e9:.0f} GB/s", f"{percent:.1f} % of {what}"]
    return {
        "seconds": seconds,
        "quartiles": {n: statistics.quantiles(s, n=4, method="inclusive")[::2] for n, s in samples.items()},
        "rounds": len(samples[OURS]),
        "bytes": size,
        "gb_per_second": size / ours / 1e9,
        "percent_of_copy": percent,
        "ratios": ratios,
        "shown": ", ".join([*shown, *(f"× {n} {v:.2f}" for n, v in ratios.items())]),
    }


@dataclass
class Data:
    """A case's arrays on the GPU, and our results to compare others with."""

    case: Case
    x: Any
    target: Any = None
    dy: Any = None
    out: Any = None
    truth: tuple[Any, ...] = ()


def prepared(case: Case) -> Data:
    """Make a case's arrays."""
    t = tools()
    dtype: Any = np.dtype(case.dtype)
    data = Data(case, t.noise(t.cupy.empty(case.shape, dtype), seed=1, scale=2.0))
    if case.kernel is xpnn.cross_entropy:
        data.target = t.cupy.asarray(np.random.default_rng(0).integers(0, case.shape[1], case.shape[0]))
        data.dy = t.cupy.ones((), np.float32)
    elif case.direction == "backward":
        data.dy = t.noise(t.cupy.empty(case.shape, dtype), seed=2)
    if case.direction != "forward" or case.kernel is not xpnn.cross_entropy:
        data.out = t.cupy.empty(case.shape, dtype)
    return data


def own(data: Data, out: Any) -> Call:
    """xpnn's call, into an array or into new ones."""
    case = data.case
    given = (data.x,) if data.target is None else (data.x, data.target)
    if case.direction == "backward":
        _, pullback = case.kernel.vjp(*given)
        into = out if data.target is None or out is None else (out, None)
        return functools.partial(pullback, data.dy, out=into)
    call = case.kernel if case.direction == "forward" else case.kernel.value_and_grad
    return functools.partial(call, *given, **({} if out is None else {"out": out}))


def composed(data: Data) -> Call:
    """The formula composed on CuPy."""
    with use_backend("array-api"):
        call = own(data, None)

    def run() -> Any:
        with use_backend("array-api"):
            return call()

    return run


def copies(size: int) -> dict[str, Call]:
    """Copies that read and write so many bytes together."""
    t = tools()
    half = -(-size // 32) * 16
    source, target = t.cupy.empty(half, np.uint8), t.cupy.empty(half, np.uint8)
    t.cupy.cuda.runtime.memset(source.data.ptr, 1, half)
    memcpy = functools.partial(target.data.copy_from_device_async, source.data, half)
    return {COPIES[0]: memcpy, COPIES[1]: functools.partial(t.copy, source, target, half)}


def flat(results: Any) -> list[Any]:
    """The arrays of a result."""
    if isinstance(results, tuple | list):
        return [a for r in results for a in flat(r)]
    return [] if results is None else [results]


def compare(data: Data, results: Any) -> None:
    """Raise unless a contender's results are ours: losses, and gradients or outputs as a whole."""
    found = flat(results)
    require(len(found) == len(data.truth), f"{len(found)} results, not {len(data.truth)}")
    limit = TOLERANCE[data.case.dtype]
    for ours, theirs in zip(data.truth, found, strict=True):
        if ours.ndim == 0:
            a, b = float(ours), float(theirs)
            require(abs(a - b) <= limit * abs(a), f"it gives {b}, xpnn {a}")
            continue
        total, worst = tools().differ(ours, theirs.contiguous() if hasattr(theirs, "contiguous") else theirs)
        far = f"it differs by {total:.2g} of all magnitudes, by {worst:.2g} of the largest; allowed is {limit:.2g}"
        require(total <= limit and worst <= limit, far)


# --- other libraries ----------------------------------------------------------------------------------------------------


def _torch_functions() -> dict[str, Callable[..., Any]]:
    torch: Any = importlib.import_module("torch")
    return {
        "softmax": lambda x: torch.softmax(x, -1),
        "log_softmax": lambda x: torch.log_softmax(x, -1),
        "cross_entropy": torch.nn.functional.cross_entropy,
        "relu": torch.relu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "gelu": torch.nn.functional.gelu,
        "silu": torch.nn.functional.silu,
        "layer_norm": lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:]),
        "rms_norm": lambda x: torch.nn.functional.rms_norm(x, x.shape[-1:]),
    }


def autograd(data: Data, function: Callable[..., Any]) -> Call:
    """A function of tensors in a case's direction, gradients by autograd."""
    torch: Any = importlib.import_module("torch")
    others = () if data.target is None else (as_torch(data.target),)
    x = as_torch(data.x)
    if data.case.direction == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return function(x, *others)

        return forward
    leaf = x.detach().requires_grad_(True)
    if data.case.direction == "backward":
        y = function(leaf, *others)
        dy = torch.ones_like(y) if data.target is not None else as_torch(data.dy)
        return functools.partial(torch.autograd.grad, y, leaf, dy, retain_graph=True)

    def both() -> Any:
        loss = function(leaf, *others)
        return loss.detach(), torch.autograd.grad(loss, leaf)

    return both


def eager(data: Data) -> Call:
    """PyTorch as it is."""
    return autograd(data, _torch_functions()[data.case.kernel.__name__])


def compiled(data: Data) -> Call:
    """torch.compile, for the case's shape alone."""
    torch: Any = importlib.import_module("torch")
    torch._dynamo.reset()
    config: Any = importlib.import_module("torch._functorch.config")
    config.donated_buffer = False  # lets a compiled graph run backward more than once
    return autograd(data, torch.compile(_torch_functions()[data.case.kernel.__name__], dynamic=False))


def liger(data: Data) -> Call:
    """Liger-Kernel; its cross_entropy makes the gradient with the loss, in the logits' place."""
    torch: Any = importlib.import_module("torch")
    if data.case.kernel is xpnn.softmax:
        return autograd(data, importlib.import_module("liger_kernel.ops.softmax").LigerSoftmaxFunction.apply)
    if data.case.direction != "value_and_grad":
        raise Skip("Liger-Kernel makes loss and gradient in one")
    function = importlib.import_module("liger_kernel.transformers.functional").liger_cross_entropy
    leaf, target = as_torch(data.x).clone().requires_grad_(True), as_torch(data.target)
    loss = function(leaf, target)
    (gradient,) = torch.autograd.grad(loss, leaf)
    compare(data, (loss.detach(), gradient))
    if gradient.data_ptr() != leaf.data_ptr():
        return autograd(data, function)

    def alone() -> None:
        function(leaf, target)  # has the gradient in its input already; what autograd adds would only wait for the GPU

    return alone


def quack(data: Data) -> Call:
    """QuACK, with gradients through autograd."""
    name = data.case.kernel.__name__
    return autograd(data, getattr(importlib.import_module(f"quack.{name}"), name))


def quack_fused(data: Data) -> Call:
    """QuACK's pass that makes losses and gradients in one, for the sum over rows."""
    if data.case.direction != "value_and_grad":
        raise Skip("it is cross_entropy's loss and gradient in one")
    function = importlib.import_module("quack.cross_entropy").cross_entropy_fwd
    x, target = as_torch(data.x), as_torch(data.target)
    losses, gradient = function(x, target, return_dx=True)
    compare(data, (losses.mean(), gradient / x.shape[0]))
    return lambda: (function(x, target, return_dx=True), None)[1]


# --- sections -----------------------------------------------------------------------------------------------------------


def cases(goals: bool) -> list[Case]:
    """What is timed, what matters most first; with `goals` only what the goals speak of."""
    found = [Case(k, direction, shape, d, "") for k, direction in DIRECTIONS for shape in SHAPES for d in GOALS]
    if goals:
        return found
    logs = tuple((xpnn.log_softmax, direction) for direction in ("forward", "backward"))
    found += [Case(k, direction, shape, d, "") for k, direction in logs for shape in SHAPES for d in GOALS]
    found += [Case(k, "forward", shape, d, "") for k in (xpnn.layer_norm, xpnn.rms_norm) for shape in SHAPES for d in GOALS]
    activations = (xpnn.relu, xpnn.sigmoid, xpnn.tanh, xpnn.gelu, xpnn.silu)
    both = [(k, direction) for k in activations for direction in ("forward", "backward")]
    found += [Case(k, direction, shape, d, "") for shape in ACTIVATED for k, direction in both for d in (*GOALS, "float16")]
    found += [Case(xpnn.linear, "forward", shape, d, "") for shape in LAYERS for d in (*GOALS, "float16")]
    return found + [Case(k, direction, s, "float16", "") for k, direction in (*DIRECTIONS, *logs) for s in SHAPES]


Maker = Callable[[Data], Call]


def timings(run: Run) -> Iterator[Row]:
    """Every case beside a copy, the formula composed on CuPy, and PyTorch as it is."""
    yield from _all(run, cases(goals=False), {"cupy": composed, "torch": eager})


def peers(run: Run) -> Iterator[Row]:
    """The cases of the goals beside torch.compile, Liger-Kernel and QuACK."""
    makers: dict[str, Maker] = {"torch.compile": compiled, "liger": liger, "quack": quack, "quack, fused": quack_fused}
    yield from _all(run, cases(goals=True), makers)


def _all(run: Run, todo: Sequence[Case], makers: dict[str, Maker]) -> Iterator[Row]:
    """Measure cases until the time is over; how long each may take follows from what is left."""
    yield {
        "check": "method",
        "verdict": "ok",
        "shown": f"single calls between events, {4 * tools().cache >> 20} MiB written before",
    }
    modules = {"torch": "torch", "torch.compile": "triton", "liger": "liger_kernel", "quack": "quack", "quack, fused": "quack"}
    absent = {n: f"{m} is not installed" for n, m in modules.items() if n in makers and not importlib.util.find_spec(m)}
    for name, why in absent.items():
        yield {"check": name, "verdict": "skipped", "why": why}
    wanted = {n: maker for n, maker in makers.items() if n not in absent}
    for k, case in enumerate(todo):
        seconds = min(max(0.2, 0.5 * run.left() / (len(todo) - k)), 2.0)
        if run.left() < 1:
            (row,) = not_reached([case.name])
        else:
            row = attempt(case.name, functools.partial(layer if case.is_product else measured, case, wanted, seconds))
            _tidy()
        if "differs" in row:
            row |= {"verdict": "failed", "why": row["differs"]}
        row["not_measured"] = absent | row.get("not_measured", {})
        goal = case.dtype in GOALS and (case.kernel, case.direction) in DIRECTIONS
        row |= {"kernel": case.kernel.__name__, "direction": case.direction, "shape": case.shape, "dtype": case.dtype}
        yield row | {"goal": goal}


def _tidy() -> None:
    """Give unused memory back to the GPU, for the other library to have."""
    importlib.import_module("cupy").get_default_memory_pool().free_all_blocks()
    if importlib.util.find_spec("torch"):
        torch: Any = importlib.import_module("torch")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _available(dtype: str) -> None:
    """Raise for a dtype that cannot be made here."""
    if dtype not in dtypes():
        raise Skip("ml_dtypes is not installed")
    if dtype == "bfloat16":
        importlib.import_module("ml_dtypes")  # tells NumPy of it


def _room(size: int) -> None:
    """Raise where the GPU has too little free memory."""
    free, _ = tools().cupy.cuda.runtime.memGetInfo()
    if free < size:
        raise Skip(f"it takes {size / 1e9:.1f} GB, {free / 1e9:.1f} are free")


def measured(case: Case, makers: dict[str, Maker], seconds: float) -> Row:
    """Race the contenders of a case, those that give our results."""
    _available(case.dtype)
    _room(3 * case.bytes)  # an estimate: what is read and written, the copy's arrays, the others' results
    data = prepared(case)
    call = own(data, data.out)
    with watching() as watched:
        data.truth = tuple(flat(call()))
        chosen = sorted(set(watched.launched))
    racing, found = joined(data, makers)
    data.truth = ()  # its memory is for the race
    samples = race({OURS: call} | copies(case.bytes) | racing, seconds)
    row = found | result_row(samples, case.bytes) | {"regimes": chosen}
    return row | {"shown": f"{row['shown']}, {'+'.join(chosen)}"}


def joined(data: Data, makers: dict[str, Maker]) -> tuple[dict[str, Call], Row]:
    """The contenders that can, and give our results; why others do not race."""
    racing: dict[str, Call] = {}
    notes: dict[str, str] = {}
    found: Row = {"tolerance": TOLERANCE[data.case.dtype], "not_measured": notes, "not_offered": {}, "first_call_seconds": {}}
    for name, maker in makers.items():
        start = time.perf_counter()
        try:
            call = maker(data)
            results = call()
            tools().cupy.cuda.runtime.deviceSynchronize()
            found["first_call_seconds"][name] = time.perf_counter() - start  # with whatever it compiles
            if results is not None:
                compare(data, results)
        except AssertionError as error:
            notes[name] = f"another result: {error}"
            if name == "cupy":
                found["differs"] = f"the formula composed on CuPy: {error}"
            continue
        except Skip as why:
            found["not_offered"][name] = str(why)
            continue
        except Exception as error:
            notes[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            continue
        racing[name] = call
    return racing, found


def layer(case: Case, makers: dict[str, Maker], seconds: float) -> Row:
    """A layer with bias and ReLU beside its bare product; the difference is the epilogue's."""
    rows, inner, units = case.shape
    _available(case.dtype)
    t = tools()
    dtype: Any = np.dtype(case.dtype)
    x = t.noise(t.cupy.empty((rows, inner), dtype), seed=1)
    weight = t.noise(t.cupy.empty((units, inner), dtype), seed=2, scale=1 / inner**0.5)
    bias = t.noise(t.cupy.empty(units, dtype), seed=3)
    out, product = t.cupy.empty((rows, units), dtype), t.cupy.empty((rows, units), dtype)
    ours = functools.partial(xpnn.linear, x, weight, bias, activation=xpnn.relu, out=out)
    data = Data(case, x, truth=(ours(),))

    def by_cupy(_: Data) -> Call:
        return lambda: t.cupy.maximum(t.cupy.matmul(x, weight.T) + bias, 0)

    def by_torch(_: Data) -> Call:
        torch: Any = importlib.import_module("torch")
        given = [as_torch(a) for a in (x, weight, bias)]
        return lambda: torch.relu_(torch.nn.functional.linear(*given))

    known: dict[str, Maker] = {"cupy": by_cupy, "torch": by_torch}
    racing, found = joined(data, {n: known[n] for n in makers})
    size = 2 * rows * units * dtype.itemsize
    bare = {"product": functools.partial(t.cupy.matmul, x, weight.T, out=product)}
    samples = race({OURS: ours} | bare | copies(size) | racing, seconds)
    row = result_row(samples, case.bytes, ["product"], "the product")
    times = row["seconds"]
    row["percent_of_product"] = row.pop("percent_of_copy")
    epilogue = times[OURS] - times["product"]
    row["epilogue_percent_of_copy"] = 100 * min(times[n] for n in COPIES) / max(epilogue, 1e-9)
    shown = f"{row['shown']}; epilogue {1e6 * epilogue:.1f} µs, {row['epilogue_percent_of_copy']:.0f} % of a copy"
    return found | row | {"epilogue_seconds": epilogue, "shown": shown}


# --- the host's time ----------------------------------------------------------------------------------------------------


def host(run: Run) -> Iterator[Row]:
    """What a call costs the host, which does not wait for the GPU: medians over single calls of small shapes."""
    t = tools()
    x = t.noise(t.cupy.empty((64, 1000), np.float32), seed=1)
    target = t.cupy.asarray(np.random.default_rng(0).integers(0, 1000, 64))
    y, dx = xpnn.softmax(x), t.cupy.empty_like(x)
    calls: dict[str, Call] = {
        "softmax(x)": lambda: xpnn.softmax(x),
        "softmax(x, out=y)": lambda: xpnn.softmax(x, out=y),
        "softmax.backward(dy, y)": lambda: xpnn.softmax.backward(x, y),
        "cross_entropy(x, t)": lambda: xpnn.cross_entropy(x, target),
        "cross_entropy.value_and_grad(x, t)": lambda: xpnn.cross_entropy.value_and_grad(x, target),
        "cross_entropy.value_and_grad(x, t, out=dx)": lambda: xpnn.cross_entropy.value_and_grad(x, target, out=dx),
        "relu(x)": lambda: xpnn.relu(x),
    }
    for name, call in calls.items():
        yield attempt(name, functools.partial(_microseconds, call)) | {"goal": True}
    others: dict[str, Call] = {"cupy: x + x": lambda: x + x}
    if importlib.util.find_spec("torch"):
        torch: Any = importlib.import_module("torch")
        if torch.cuda.is_available():
            tensor = as_torch(x)
            others["torch.softmax(x)"] = lambda: torch.softmax(tensor, -1)
    for name, call in others.items():
        yield attempt(f"for comparison, {name}", functools.partial(_microseconds, call))


def _microseconds(call: Call) -> Row:
    samples: list[int] = []
    for _ in range(20):  # so that what the GPU is given never piles up
        for _ in range(3):
            call()
        for _ in range(20):
            start = time.perf_counter_ns()
            call()
            samples.append(time.perf_counter_ns() - start)
        tools().cupy.cuda.runtime.deviceSynchronize()
    median = statistics.median(samples) / 1000
    return {"microseconds": median, "shown": f"{median:.1f} µs"}
