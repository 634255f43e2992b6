"""The check on a GPU, where there is none: how it runs its sections, what it makes of what they find, what it skips."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import xpnn
from xpnn import testing
from xpnn.backends.cupy import host
from xpnn.backends.cupy.regime import Device
from xpnn.benchmarks import gpu_check, gpu_sections, gpu_timing, gpu_tools
from xpnn.benchmarks.gpu_check import Run, Runner, Section

ROOT = Path(__file__).parent.parent
OWN = """
import threading

def fine(run):
    yield {"check": "first", "verdict": "ok", "value": float("nan"), "part": run.part}

def raises(run):
    yield {"check": "before", "verdict": "ok"}
    raise RuntimeError("it broke")

def dies(run):
    yield {"check": "before", "verdict": "ok"}
    import os
    os._exit(7)

def wrong(run):
    yield {"check": "good", "verdict": "ok"}
    yield {"check": "bad", "verdict": "failed", "why": "it differs"}

def endless(run):
    yield {"check": "before", "verdict": "ok"}
    threading.Event().wait()
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Sections of our own, by name."""
    (tmp_path / "own_sections.py").write_text(OWN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return lambda name, **more: Section(name, f"own_sections:{name}", 1, gpu=False, **more)


def run(tmp_path, sections, **more):
    """The exit status, and the file."""
    out = tmp_path / "out.json"
    status = Runner(out, **more)(sections)
    assert [p.name for p in tmp_path.iterdir() if ".json" in p.name] == ["out.json"]
    return status, json.loads(out.read_text("utf-8"), parse_constant=pytest.fail)


# --- the whole of it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [gpu_check.__file__, str(ROOT / "benchmarks" / "gpu_check.py")], ids=["package", "checkout"])
def test_without_a_gpu(tmp_path, script):
    """It ends well, says what it skipped, and writes valid JSON; from a checkout it takes the checkout's package."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    environment.pop("XPNN_GPU_CHECK_HOST", None)
    done = subprocess.run(
        [sys.executable, "-W", "error", script, "--out", str(tmp_path / "o.json")],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "o.json").read_text("utf-8"), parse_constant=pytest.fail)
    states = {name: section["state"] for name, section in found["sections"].items()}
    assert states.pop("environment") == "ok"
    assert len(states) > 5
    assert set(states.values()) == {"skipped"}
    for name in states:
        assert f"{name}: SKIPPED, no GPU" in done.stdout
    assert "NOT MEASURED: at least 90 % of a copy" in done.stdout
    assert found["gpu"] is None
    assert found["versions"]["numpy"] == np.__version__
    assert all(goal["met"] is None for goal in found["goals"])
    if script == str(ROOT / "benchmarks" / "gpu_check.py"):
        assert f"from {ROOT / 'src' / 'xpnn'}" in done.stdout


def test_sections_fail_alone(tmp_path, own, capfd):
    """One that raises, dies, or finds something wrong is reported, and the others run."""
    status, found = run(tmp_path, [own(name) for name in ("raises", "dies", "wrong", "fine")])
    assert status == 1
    sections = found["sections"]
    assert {name: s["state"] for name, s in sections.items()} == {
        "raises": "failed", "dies": "failed", "wrong": "failed", "fine": "ok",
    }  # fmt: skip
    assert sections["raises"]["why"] == "RuntimeError: it broke"
    assert sections["dies"]["why"] == "it ended with status 7"
    assert sections["wrong"]["failed"] == ["bad"]
    assert [row["check"] for row in sections["raises"]["rows"]] == ["before"]
    assert sections["fine"]["rows"][0]["value"] == "nan"  # which JSON does not have
    said = capfd.readouterr().out
    assert "FAILED: raises RuntimeError: it broke" in said
    assert "it differs" in said


def test_a_section_that_does_not_end(tmp_path, own, capfd):
    """It is cut off; what it has found until then stays, and the next one runs."""
    runners: list[Runner] = []

    def clock():  # time stands still until the section has found something, and its limit is over then
        written = any((r.folder / "endless.0").exists() and (r.folder / "endless.0").stat().st_size for r in runners)
        return 300.0 if written else 0.0

    runners.append(Runner(tmp_path / "out.json", budget=450, clock=clock))
    assert runners[0]([own("endless"), own("fine")]) == 1
    found = json.loads((tmp_path / "out.json").read_text("utf-8"))["sections"]
    assert found["endless"]["state"] == "cut off"
    assert [row["check"] for row in found["endless"]["rows"]] == ["before"]
    assert found["fine"]["state"] == "ok"
    assert "CUT OFF: endless at its limit, after 1 rows" in capfd.readouterr().out


def test_an_interrupted_run(tmp_path, own):
    """What was found until then is in the file, and no process is left."""
    runners: list[Runner] = []

    def clock():
        file = runners[0].folder / "endless.0" if runners else tmp_path
        if file.is_file() and file.stat().st_size and runners[0].found["endless"]["state"] == "running":
            raise KeyboardInterrupt
        return 0.0

    runners.append(Runner(tmp_path / "out.json", budget=450, clock=clock))
    with pytest.raises(KeyboardInterrupt):
        runners[0]([own("endless"), own("fine")])
    found = json.loads((tmp_path / "out.json").read_text("utf-8"))["sections"]
    assert found["endless"]["why"] == "the run was interrupted"
    assert [row["check"] for row in found["endless"]["rows"]] == ["before"]
    assert found["fine"]["state"] == "not reached"


def test_parts(tmp_path, own):
    status, found = run(tmp_path, [own("fine", parts=3)])
    assert status == 0
    assert sorted(row["part"] for row in found["sections"]["fine"]["rows"]) == [0, 1, 2]


def test_wheels_beside_the_script(tmp_path, monkeypatch):
    """Pure-Python ones can be imported; others cannot from where they are."""
    (tmp_path / "wheels").mkdir()
    for name in ("some-1.0-py3-none-any.whl", "other-1.0-cp312-cp312-linux_x86_64.whl"):
        (tmp_path / "wheels" / name).touch()
    monkeypatch.setattr(gpu_check, "HERE", tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), "elsewhere"])
    gpu_check.importable()
    assert sys.path == ["elsewhere", str(tmp_path / "wheels" / "some-1.0-py3-none-any.whl")]


def test_command_line(capsys):
    assert [s.name for s in gpu_check.chosen(["timings"])] == ["environment", "timings"]
    assert gpu_check.chosen(["a:b"])[1].where == "a:b"
    with pytest.raises(SystemExit, match="expected one of environment, regimes"):
        gpu_check.chosen(["nothing"])
    with pytest.raises(SystemExit):
        gpu_check.main(["--out", "/no such folder/x.json"])
    assert "there is no folder" in capsys.readouterr().err


def test_the_file_is_named_after_date_and_device(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "HERE", tmp_path)
    (tmp_path / "results").mkdir()
    runner = Runner()
    runner.machine = {"gpu": {"name": "NVIDIA H100 80GB HBM3"}}
    first = runner.path()
    assert first.name == f"{runner.date:%Y-%m-%d}-nvidia-h100-80gb-hbm3.json"
    first.touch()
    runner.out = None
    assert runner.path().name.endswith("-hbm3-2.json")
    runner.folder.rmdir()


# --- what it makes of what it finds ---------------------------------------------------------------------------------------


def timed(check, **more):
    return {"check": check, "goal": True, **more}


def test_goals():
    """Every miss is named; what was not measured keeps a goal from being met."""
    copy, compiled, liger, quack, call = gpu_check.goals({
        "timings": {"rows": [timed("a", percent_of_copy=95.0), timed("b", percent_of_copy=80.0), {"check": "no goal"}]},
        "peers": {"rows": [
            timed("a", ratios={"torch.compile": 1.2, "quack": 1.5, "quack, fused": 0.9}, not_measured={"liger": "absent"}),
            timed("b", ratios={"torch.compile": 1.1}, not_measured={"liger": "absent"}, not_offered={"quack": "none"}),
        ]},
        "host": {"rows": [timed("f", microseconds=9.0), timed("g", why="it failed")]},
    })  # fmt: skip
    assert (copy["met"], copy["measured"], copy["missed"]) == (False, 2, ["b: 80.0 %"])
    assert (compiled["met"], compiled["measured"]) == (True, 2)
    assert (liger["met"], liger["not_measured"]) == (None, {"absent": 2})
    assert (quack["met"], quack["missed"], quack["measured"]) == (False, ["a: 0.90 of our time"], 1)
    assert (call["met"], call["not_measured"]) == (None, {"it failed": 1})


def test_worst_errors():
    row = {"kernel": "softmax", "dtype": "float32", "variant": "-", "direction": "forward", "verdict": "ok", "bound_ulp": 4.0}
    found = gpu_check.worst_errors([
        row | {"error_ulp": 1.0}, row | {"error_ulp": 3.0, "direction": "backward"}, row | {"error_ulp": 2.0},
        row | {"error_ulp": 9e9, "truth": "central differences"},
    ])  # fmt: skip
    assert found["softmax"]["float32"]["error_ulp"] == 3
    assert found["softmax"]["float32"]["direction"] == "backward"


def test_result_row():
    samples = {"xpnn": [2e-3, 4e-3, 3e-3], "copy, memcpy": [2.9e-3] * 3, "copy, kernel": [2.7e-3] * 3, "torch": [1.5e-3] * 3}
    row = gpu_timing.result_row(samples, 6 * 10**9)
    assert row["percent_of_copy"] == pytest.approx(90)
    assert row["gb_per_second"] == pytest.approx(2000)
    assert row["ratios"] == {"torch": pytest.approx(0.5)}


def test_differences():
    """They are relative to the sum of magnitudes, and to the largest."""
    parts = np.array([[1.0, 10.0, 0.5, 2.0], [1.0, 10.0, 0.25, 5.0]])
    assert gpu_tools.apart(parts) == (0.1, 0.1)
    assert gpu_tools.apart(np.zeros((2, 4))) == (0.0, 0.0)


# --- the sections' own parts ----------------------------------------------------------------------------------------------


def test_cases():
    """What matters most comes first, and all of the goals' cases are there."""
    cases = gpu_timing.cases(goals=False)
    assert cases[: len(goals := gpu_timing.cases(goals=True))] == goals
    assert len({case.name for case in cases}) == len(cases)
    assert {case.dtype for case in cases} == {"float32", "bfloat16", "float16"}
    assert {(8192, 128256), (4096, 50257), (32768, 1024), (1024, 262144)} <= {case.shape for case in goals}


@pytest.mark.parametrize("name", sorted({c.kernel.__name__ for c in gpu_timing.cases(goals=False) if not c.is_product}))
def test_peers_compute_the_same(name):
    """What is raced with a kernel is PyTorch's function of the same name and defaults."""
    torch = pytest.importorskip("torch", reason="torch is not installed: what is raced with kernels is not compared")
    x = np.random.default_rng(0).normal(size=(6, 9))
    target = (np.arange(6),) if name == "cross_entropy" else ()
    theirs = gpu_timing._torch_functions()[name](torch.from_numpy(x), *map(torch.from_numpy, target))
    np.testing.assert_allclose(getattr(xpnn, name)(x, *target), theirs, rtol=1e-12)


def test_borders():
    """Both sides of every change of regime, as few and as many columns as it takes."""
    found = gpu_sections.borders(gpu_sections.OPS[0], "float32", Device())
    assert {1024, 1025, 16384, 16385, 262144, 262145} <= set(found)


def test_same_bits():
    a = np.array([1.0, np.nan, 0.0], np.float32)
    assert gpu_sections.same_bits(a, a.copy())
    assert not gpu_sections.same_bits(a, np.array([1.0, np.nan, -0.0], np.float32))
    assert not gpu_sections.same_bits(a, a[:2])


def test_attempt():
    def wrong():
        gpu_sections.require(1 > 2, "it is wrong")

    def absent():
        raise gpu_sections.Skip("there is none")

    assert gpu_sections.attempt("a", lambda: {"shown": "1"}) == {"check": "a", "verdict": "ok", "shown": "1"}
    row = gpu_sections.attempt("a", wrong)
    assert (row["verdict"], row["why"]) == ("failed", "AssertionError: it is wrong")
    assert gpu_sections.attempt("a", absent) == {"check": "a", "verdict": "skipped", "why": "there is none"}


def test_time_is_over():
    """Checks that there is no time for are named."""
    rows = list(gpu_sections.attempts(Run(end=0.0), [("a", dict), ("b", dict)]))
    assert [(row["check"], row["verdict"]) for row in rows] == [("a", "not reached"), ("b", "not reached")]


@pytest.mark.skipif(host.compiler() is None, reason="no C++ compiler: CUDA kernels not run on the CPU")
def test_a_check_of_rows():
    """One of the GPU's checks, on kernels that the CPU runs; and one that finds a wrong result."""
    pytest.importorskip("cupy")
    op = gpu_sections.OPS[0]
    with host.running(), testing.place("cupy") as at:
        found = gpu_sections.row_check(at, op, "float32", 33)
        assert found["regimes"]["as it is"] == ["warp"]
        sample = op.sample("float32", 33)
        result = at.back(op({n: at.there(a) for n, a in sample.items()}))
    op.right(sample, result, "float32")
    result[0, 5] *= 1 + 2.0**-18
    with pytest.raises(AssertionError, match="beyond its bound"):
        op.right(sample, result, "float32")


def test_own_kernels_compile():
    pytest.importorskip("cupy")
    from xpnn.backends.cupy import inspect

    assert len(inspect.compile_for(gpu_tools.source(), 90).registers) == 7
    assert inspect.compile_for(gpu_tools.WAIT, 90).registers
