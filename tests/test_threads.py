"""Many Python threads, processes forked after use, and numbers of threads, whatever threading layer Numba finds."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import xpnn
from xpnn.cli import main

SCRIPT = """
    import json, os, signal, threading, warnings
    import numpy as np, xpnn
    from xpnn.backends.numba import pool

    try:
        found = pool.layer()
    except ValueError as error:
        print(json.dumps({"missing": str(error)}))
        raise SystemExit

    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(600, 700)), rng.normal(size=(40, 700))
    target, dy = rng.integers(0, 700, 600), rng.normal(size=(600, 700))
    works = [
        lambda: xpnn.softmax(x), lambda: xpnn.sigmoid(x), lambda: xpnn.logsumexp(x),
        lambda: xpnn.cross_entropy.value_and_grad(x, target)[1],
        lambda: xpnn.softmax.vjp(x)[1](dy), lambda: xpnn.linear(x, w, activation=xpnn.tanh),
    ]
    report = {"layer": found, "wrong": [], "errors": []}
    with xpnn.use_backend("numpy"):
        truth = [work() for work in works]
    right = lambda k: np.allclose(works[k](), truth[k], rtol=1e-10, atol=1e-13)

    def run(number, start):
        try:
            start.wait()
            for k in range(2 * len(works)):
                k = (k + number) % len(works)
                if not right(k):
                    report["wrong"].append(k)
        except Exception as error:
            report["errors"].append(repr(error))

    start = threading.Barrier(16)
    threads = [threading.Thread(target=run, args=(n, start)) for n in range(16)]
    [t.start() for t in threads]
    [t.join() for t in threads]

    if hasattr(os, "fork"):
        warnings.simplefilter("ignore")  # forking beside threads is what is tested
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            os._exit(0 if all(right(k) for k in range(len(works))) else 9)
        report["child"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        report["parent"] = all(right(k) for k in range(len(works)))
    print(json.dumps(report))
"""


@pytest.mark.parametrize("layer", ["tbb", "omp", "workqueue"])
def test_layers(python: Callable[..., str], layer: str) -> None:
    """16 threads at different kernels, then a forked child; workqueue aborts if two threads enter it at once."""
    printed = python(SCRIPT, NUMBA_THREADING_LAYER=layer, XPNN_NUM_THREADS="3")
    report = json.loads(printed.splitlines()[-1])  # before it, tbb may say that it could not join its threads
    if "missing" in report:
        pytest.skip(f"Numba's threading layer {layer} is not here")
    assert report.pop("layer") == layer
    child, parent = report.pop("child", 0), report.pop("parent", True)
    assert report == {"wrong": [], "errors": []}
    assert child == 0
    assert parent


def test_threads_meet_at_the_first_call(python: Callable[..., str], tmp_path: Any) -> None:
    """Tracing, compiling and starting the threads, all at once, in an empty cache."""
    code = """
        import threading, numpy as np, xpnn
        x = np.random.default_rng(0).normal(size=(1000, 300))
        start, found = threading.Barrier(8), []

        def run():
            start.wait()
            found.append(xpnn.softmax(x))

        threads = [threading.Thread(target=run) for _ in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        e = np.exp(x)
        print(len(found), all(np.allclose(y, e / e.sum(-1, keepdims=True), rtol=1e-12) for y in found))
    """
    assert python(code, XPNN_CACHE_DIR=str(tmp_path / "cache"), XPNN_NUM_THREADS="2") == "8 True\n"


# --- how many ---------------------------------------------------------------------------------------------------------------

BIG = np.random.default_rng(0).normal(size=(1000, 301))
CLASSES = np.random.default_rng(1).integers(0, 301, 1000)


@pytest.mark.parametrize("count", ["1", "3", "16"])
def test_number_of_threads(monkeypatch: pytest.MonkeyPatch, count: str, close: Callable[..., None]) -> None:
    """More than there are processors, or one: the same bits."""
    from xpnn.backends.numba import pool

    with xpnn.use_backend("numba"):
        monkeypatch.setenv("XPNN_NUM_THREADS", "2")
        want = xpnn.softmax(BIG), *xpnn.cross_entropy.value_and_grad(BIG, CLASSES)
        monkeypatch.setenv("XPNN_NUM_THREADS", count)
        assert pool.count() == int(count)
        got = xpnn.softmax(BIG), *xpnn.cross_entropy.value_and_grad(BIG, CLASSES)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)
    close(got[0], np.exp(BIG) / np.exp(BIG).sum(-1, keepdims=True))


@pytest.mark.parametrize("bad", ["0", "-1", "two", "1.5", " ", "²"])
def test_bad_number_of_threads(monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    monkeypatch.setenv("XPNN_NUM_THREADS", bad)
    out = np.full_like(BIG, 7.0)
    with xpnn.use_backend("numba"), pytest.raises(ValueError, match="XPNN_NUM_THREADS") as raised:
        xpnn.softmax(BIG, out=out)
    assert repr(bad) in str(raised.value)
    assert "whole number" in str(raised.value)
    assert (out == 7).all()


@pytest.mark.parametrize("arguments", [["info"], ["show", "relu"]])
def test_a_bad_environment_on_the_command_line(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    """One line, not a traceback."""
    monkeypatch.setenv("XPNN_NUM_THREADS", "two")
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    assert done.output == "Error: XPNN_NUM_THREADS: got 'two', expected a whole number of at least 1\n"
    monkeypatch.setenv("XPNN_NUM_THREADS", "1")
    monkeypatch.setattr("xpnn.backends.choice.process", "abc")  # XPNN_BACKEND=abc
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    assert done.output.startswith("Error: backend: got 'abc', expected one of auto, ")
    assert done.output.count("\n") == 1


def test_brackets_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to be installed is named with its extra."""
    monkeypatch.setattr("xpnn.cli._available", lambda name: "not available: pip install xpnn[cuda13]")
    assert "xpnn[cuda13]" in CliRunner().invoke(main, ["info"]).output
