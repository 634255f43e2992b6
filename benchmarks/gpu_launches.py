"""The sections of `gpu_check` about what only a GPU has: streams, graphs, clusters, memory of many gigabytes, a sanitizer."""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import xpnn
from xpnn import samples
from xpnn.backends.cupy import machine
from xpnn.benchmarks.gpu_sections import (
    FACES,
    OPS,
    Array,
    Op,
    Skip,
    attempt,
    attempts,
    dtypes,
    require,
    row_check,
    same_bits,
    shifted,
    watching,
)
from xpnn.benchmarks.gpu_tools import tools

if TYPE_CHECKING:
    from xpnn.benchmarks.gpu_check import Row, Run

WIDE = 262_144
CLUSTERS = (("float32", 20_000), ("float32", 100_000), ("float32", 200_001), ("float16", 50_000), ("float64", 20_000))
GRAPHS = ("softmax", "softmax.backward", "cross_entropy.value_and_grad", "relu", "linear")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


def launches(run: Run) -> Iterator[Row]:
    """Streams, threads, graphs, clusters, the longest rows, more than 2³¹ elements."""
    todo: list[tuple[str, Callable[[], Row | None]]] = [
        ("backend auto takes CuPy arrays", _automatic),
        ("a non-blocking stream", _stream),
        ("four threads, a stream each", _threads),
        *((f"a graph of {name}", functools.partial(_graph, name)) for name in GRAPHS),
        *((f"clusters, {dtype}, {c} columns", functools.partial(_cluster, dtype, c)) for dtype, c in CLUSTERS),
        *((f"2^31 elements, {name}", functools.partial(_beyond, name)) for name in ("relu", "softmax", "cross_entropy")),
        *((f"{op.name} {d}, {WIDE} columns", functools.partial(_wide, op, d)) for op in OPS for d in dtypes()),
    ]
    yield from attempts(run, todo)


def _automatic() -> None:
    cupy: Any = importlib.import_module("cupy")
    chosen = xpnn.softmax.explain(cupy.ones((2, 3), np.float32))
    require(chosen == "cupy", f"it chooses {chosen}")


def _logits(seed: int, shape: tuple[int, int] = (4096, 1000)) -> tuple[Any, Any]:
    """Logits and targets on the GPU."""
    cupy: Any = importlib.import_module("cupy")
    rng = np.random.default_rng(seed)
    return cupy.asarray(3 * rng.standard_normal(shape, np.float32)), cupy.asarray(rng.integers(0, shape[1], shape[0]))


def _stream() -> None:
    """Results follow the work that is before them on their stream, which the null stream would not wait for."""
    cupy: Any = importlib.import_module("cupy")
    (x, t), (later, _) = _logits(1), _logits(2)
    y, dx = cupy.empty_like(x), cupy.empty_like(x)
    expected = cupy.asnumpy(xpnn.softmax(later))
    loss, gradient = (cupy.asnumpy(a) for a in xpnn.cross_entropy.value_and_grad(later, t))
    xpnn.softmax(x, out=y)  # compiled, so that what follows is fast
    xpnn.cross_entropy.value_and_grad(x, t, out=dx)
    tools().wait(1)
    y.data.copy_from_device_async(x.data, x.nbytes)
    cupy.cuda.runtime.deviceSynchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        tools().wait(200_000_000)
        x.data.copy_from_device_async(later.data, x.nbytes)
        xpnn.softmax(x, out=y)
        found, _ = xpnn.cross_entropy.value_and_grad(x, t, out=dx)
        require(not stream.done, "a call waits for the GPU")
    stream.synchronize()
    require(same_bits(cupy.asnumpy(y), expected), "softmax ran elsewhere than on the current stream")
    require(same_bits(cupy.asnumpy(dx), gradient), "cross_entropy ran elsewhere than on the current stream")
    require(same_bits(np.atleast_1d(cupy.asnumpy(found)), np.atleast_1d(loss)), "the loss was made elsewhere")


def _threads() -> None:
    """Threads that call at once, each on a stream of its own, get what they would get alone."""
    cupy: Any = importlib.import_module("cupy")
    given = [_logits(seed) for seed in range(4)]
    expected = [(cupy.asnumpy(xpnn.softmax(x)), cupy.asnumpy(xpnn.cross_entropy.value_and_grad(x, t)[1])) for x, t in given]
    together = threading.Barrier(len(given))

    def calls(k: int) -> str:
        x, t = given[k]
        stream = cupy.cuda.Stream(non_blocking=True)
        together.wait()
        with stream:
            for turn in range(20):
                y, (_, dx) = xpnn.softmax(x), xpnn.cross_entropy.value_and_grad(x, t)
                stream.synchronize()
                if not same_bits(cupy.asnumpy(y), expected[k][0]) or not same_bits(cupy.asnumpy(dx), expected[k][1]):
                    return f"thread {k} gets something else in turn {turn}"
        return ""

    cupy.cuda.runtime.deviceSynchronize()
    with ThreadPoolExecutor(len(given)) as pool:
        require(not (wrong := [text for text in pool.map(calls, range(len(given))) if text]), "; ".join(wrong))


def _graph(name: str) -> None:
    """Captured after a warm-up, replayed with other inputs in the same place."""
    cupy: Any = importlib.import_module("cupy")
    (x, t), out = _logits(1), cupy.empty((4096, 1000), np.float32)
    weight = cupy.asarray(np.linspace(-1, 1, 64_000, dtype=np.float32).reshape(64, 1000))
    run: Callable[[Any, Any], Any] = {
        "softmax": lambda x, out: xpnn.softmax(x, out=out),
        "softmax.backward": lambda x, out: xpnn.softmax.backward(x, x, out=out),
        "cross_entropy.value_and_grad": lambda x, out: xpnn.cross_entropy.value_and_grad(x, t, out=out),
        "relu": lambda x, out: xpnn.relu(x, out=out),
        "linear": lambda x, out: xpnn.linear(x, weight, activation=xpnn.relu),
    }[name]

    def host(results: Any) -> list[Array]:
        return [np.atleast_1d(cupy.asnumpy(a)) for a in (results if isinstance(results, tuple) else (results,))]

    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()  # what the graph uses is nobody else's
    cupy.cuda.runtime.deviceSynchronize()
    with cupy.cuda.using_allocator(pool.malloc), stream:
        for _ in range(2):
            run(x, out)
        stream.synchronize()
        stream.begin_capture()
        try:
            results = run(x, out)
        except BaseException:
            with contextlib.suppress(Exception):
                stream.end_capture()
            raise
        graph = stream.end_capture()
    for seed in (2, 3):
        later, _ = _logits(seed)
        expected = host(run(later, cupy.empty_like(x)))
        x.data.copy_from_device(later.data, x.nbytes)
        cupy.cuda.runtime.deviceSynchronize()
        graph.launch(stream)
        stream.synchronize()
        for a, b in zip(host(results), expected, strict=True):
            require(same_bits(a, b), f"replay {seed - 1} differs from a call")


def _cluster(dtype: str, columns: int) -> Row:
    """Clusters are launched where the choice has them, and give the bits that other regimes give."""
    device = machine.assumed()
    if not device.clusters:
        raise Skip(f"compute capability {device.capability / 10} has no clusters")
    with samples.place("cupy") as at:
        found = row_check(at, OPS[0], dtype, columns, rows=device.processors)
    require("cluster" in found["regimes"]["as it is"], f"no cluster is launched: {found['regimes']}")
    return found


def _wide(op: Op, dtype: str) -> Row:
    with samples.place("cupy") as at:
        return row_check(at, op, dtype, WIDE)


def _beyond(name: str) -> Row:
    """70,000 × 32,768 of float16 are 2.29e9 elements: rows on both sides of the 2³¹st are looked at."""
    cupy: Any = importlib.import_module("cupy")
    shape, rows = (70_000, 32_768), [0, 1, 40_000, 65_535, 65_536, 69_998, 69_999]
    cupy.get_default_memory_pool().free_all_blocks()
    free, _ = cupy.cuda.runtime.memGetInfo()
    need = 2 * shape[0] * shape[1] * (1 if name == "cross_entropy" else 2) + (1 << 30)
    if free < need:
        raise Skip(f"it takes {need / 1e9:.1f} GB, {free / 1e9:.1f} are free")
    x = cupy.empty(shape, np.float16)
    tools().noise(x, seed=1)
    sample: dict[str, Array] = {"x": np.stack([cupy.asnumpy(x[r]) for r in rows])}
    if name == "cross_entropy":
        target = np.random.default_rng(0).integers(0, shape[1], shape[0])
        op, sample = OPS[1], {"logits": sample["x"], "target": target[rows]}
        y = op({"logits": x, "target": cupy.asarray(target)}, out=x)
    else:
        op = Op(getattr(xpnn, name), "forward")
        y = op({"x": x})
    found = op.right(sample, np.stack([cupy.asnumpy(y[r]) for r in rows]), "float16")
    return found | {"shown": f"{x.size:.3g} elements, {found['error_ulp']:.3g} of {found['bound_ulp']:.3g} ULP"}


# --- compute-sanitizer --------------------------------------------------------------------------------------------------


def sanitizer(run: Run) -> Iterator[Row]:
    """NVIDIA's four tools over `tiny`."""
    found = _sanitizer()
    for tool in run.mine(SANITIZERS):
        if found is None:
            yield {"check": tool, "verdict": "skipped", "why": "compute-sanitizer is not installed"}
        else:
            yield attempt(tool, functools.partial(_sanitize, found, tool, run.left()))


def _sanitizer() -> str | None:
    places = [*Path("/usr/local").glob("cuda*/bin"), *Path("/usr/local").glob("cuda*/compute-sanitizer")]
    for folder in sys.path:
        places += [*Path(folder, "nvidia").glob("*/bin"), *Path(folder, "nvidia").glob("*/compute-sanitizer")]
    places.append(Path(sysconfig.get_paths()["scripts"]))
    for path in (None, *map(str, places)):
        if found := shutil.which("compute-sanitizer", path=path):
            return found
    return None


def _sanitize(program: str, tool: str, seconds: float) -> Row:
    """Run the tiny calls under a tool, which reports errors in its exit status and its summary."""
    script = Path(__file__).with_name("gpu_check.py")
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder, "rows")
        command = [program, "--tool", tool, "--error-exitcode", "86", sys.executable, str(script), "--into", str(into)]
        command += ["--section", "xpnn.benchmarks.gpu_launches:tiny", "--limit", f"{seconds:.0f}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(seconds, 1), check=False)
        except subprocess.TimeoutExpired:
            raise Skip(f"it took longer than {seconds:.0f} s") from None
        written = into.read_text(encoding="utf-8") if into.exists() else ""
    summary = [text.strip("= ") for text in done.stdout.splitlines() if "SUMMARY" in text]
    said = "; ".join(summary) or (done.stdout + done.stderr)[-600:]
    errors = [text for text in done.stdout.splitlines() if text.startswith("=========")][:40]
    if re.search(r"not supported|Failed to|insufficient|permission", done.stdout) and not summary:
        raise Skip(f"it does not run here: {said}")
    require('"ended": "whole"' in written, f"the calls did not end: status {done.returncode}, {said}")
    calls = written.count('"check"')
    clean = done.returncode == 0 and summary and all(re.search(r"\b0 (errors|hazards)", text) for text in summary)
    require(clean, f"status {done.returncode}: {said}\n" + "\n".join(errors))
    return {"shown": f"{calls} calls: {said}"}


def tiny(run: Run) -> Iterator[Row]:
    """Every regime on shapes as small as it allows, each array in memory of its own, so that a tool sees its bounds."""
    if machine.present():
        importlib.import_module("cupy").cuda.set_allocator(None)
    with samples.place("cupy") as at:
        for op, dtype in ((op, dtype) for op in OPS for dtype in dtypes()):
            for columns in (7, 33, 1024, 3001, 17_000) if dtype in ("float32", "bfloat16") else (33, 3001):
                for face, changes in FACES.items() if columns > 16_384 else (("as it is", {}),):
                    sample = {n: a[:3] for n, a in op.sample(dtype, columns).items()}
                    with watching(**changes) as watched:
                        at.back(op({n: at.there(a) for n, a in sample.items()}))
                    yield {"check": f"{op.name} {dtype} {columns} {face}", "shown": ", ".join(sorted(set(watched.launched)))}
        x = np.linspace(-1, 1, 35, dtype=np.float32).reshape(5, 7)
        y, pullback = xpnn.linear.vjp(at.there(x), at.there(x[:3]), at.there(x[0, :3]), activation=xpnn.sigmoid)
        pullback(at.there(np.ones(y.shape, np.float32)))
        yield {"check": "linear"}
        xpnn.tanh.vjp(shifted(at, x))[1](at.there(x))
        yield {"check": "tanh"}
