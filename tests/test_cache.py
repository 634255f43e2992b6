"""Emitted code as files: readable, private, shared between processes, and never in the way."""

from __future__ import annotations

import ast
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

USE = """
    import numpy as np, xpnn
    x = np.linspace(-1, 1, 6).reshape(2, 3)
    assert xpnn.softmax.explain(x) == "numba"
    e = np.exp(x)
    np.testing.assert_allclose(xpnn.softmax(x), e / e.sum(-1, keepdims=True), rtol=1e-14)
    np.testing.assert_allclose(xpnn.sigmoid(x), 1 / (1 + 1 / e), rtol=1e-14)
    print("right")
"""


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder, two levels below what exists, that one process has filled."""
    folder = tmp_path_factory.mktemp("cache") / "deep" / "xpnn"
    code = "\n".join(line.strip() for line in USE.splitlines())
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"XPNN_CACHE_DIR": str(folder)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "right\n"
    return folder


@pytest.fixture
def copied(filled: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(filled, tmp_path / "copy")


def modules(folder: Path, name: str = "") -> list[Path]:
    found = sorted(folder.rglob(f"{name}*.py"))
    assert found
    return found


def test_folder_is_respected_and_private(filled: Path) -> None:
    assert stat.S_IMODE(filled.stat().st_mode) == 0o700
    assert {p.name.split("_")[0] for p in modules(filled)} >= {"softmax", "sigmoid"}
    assert len([*filled.rglob("*.nbc")]) >= 2
    assert [*filled.rglob("*.tmp")] == []


def test_files_are_readable(filled: Path) -> None:
    """Python text that says which program it was emitted from."""
    (path,) = modules(filled, "softmax_")
    text = path.read_text(encoding="utf-8")
    assert any(isinstance(node, ast.FunctionDef) for node in ast.parse(text).body)
    assert "xpnn: softmax (y), float64" in text
    assert "row_max" in text
    assert max(map(len, text.splitlines())) < 300


def test_next_process_compiles_nothing(filled: Path, python: Callable[..., str]) -> None:
    before = state(filled)
    assert python(USE, XPNN_CACHE_DIR=str(filled)) == "right\n"
    assert state(filled) == before
    python("import numpy as np, xpnn; xpnn.tanh(np.ones(2))", XPNN_CACHE_DIR=str(filled))
    added = state(filled).keys() - before.keys()
    assert added
    assert all("tanh" in name for name in added)


def test_changed_file_is_rewritten(copied: Path, python: Callable[..., str]) -> None:
    """What lies in the folder is not believed; the same text comes back."""
    (path,) = modules(copied, "softmax_")
    text = path.read_text(encoding="utf-8")
    path.write_text("raise SystemExit('spoilt')\n", encoding="utf-8")
    assert python(USE, XPNN_CACHE_DIR=str(copied)) == "right\n"
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("content", [b"", b"spoilt"], ids=["empty", "spoilt"])
def test_spoilt_machine_code(copied: Path, python: Callable[..., str], suffix: str, content: bytes) -> None:
    """A disk that was full, a process that was killed: compiled again, nobody is troubled."""
    files = [*copied.rglob(f"*.{suffix}")]
    assert files
    for path in files:
        path.write_bytes(content)
    assert python(USE, XPNN_CACHE_DIR=str(copied)) == "right\n"


def unusable(kind: str, tmp_path: Path) -> Path:
    path = tmp_path / "cache"
    if kind == "a file":
        path.write_text("in the way")
    elif kind == "below a file":
        path.write_text("in the way")
        path = path / "xpnn"
    elif kind == "read-only":
        if os.geteuid() == 0:
            pytest.skip("root may write anywhere")
        path.mkdir(mode=0o500)
    elif kind == "/proc":
        if not Path("/proc/self").exists():
            pytest.skip("no /proc here")
        path = Path("/proc/xpnn")
    return path


@pytest.mark.parametrize("kind", ["a file", "below a file", "read-only", "/proc"])
def test_unusable_folder(kind: str, tmp_path: Path, python: Callable[..., str]) -> None:
    """Works all the same, compiled for this process alone, and leaves nothing behind."""
    folder, rest = unusable(kind, tmp_path), tmp_path / "temporary"
    rest.mkdir()
    assert python(USE, XPNN_CACHE_DIR=str(folder), TMPDIR=str(rest)) == "right\n"
    assert [*rest.glob("xpnn*")] == []
    if kind == "a file":
        assert folder.read_text() == "in the way"


def test_folder_open_to_others_is_closed(copied: Path, python: Callable[..., str]) -> None:
    copied.chmod(0o777)
    assert python(USE, XPNN_CACHE_DIR=str(copied)) == "right\n"
    assert stat.S_IMODE(copied.stat().st_mode) == 0o700


def test_folder_removed_while_in_use(tmp_path: Path, python: Callable[..., str]) -> None:
    code = """
        import os, shutil, numpy as np, xpnn
        xpnn.relu(np.ones(2))
        shutil.rmtree(os.environ["XPNN_CACHE_DIR"])
        print(xpnn.tanh(np.zeros(2)), xpnn.relu(np.ones(2)))
    """
    assert python(code, XPNN_CACHE_DIR=str(tmp_path / "cache")) == "[0. 0.] [1. 1.]\n"


def test_several_processes_fill_it_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    code = "\n".join(line.strip() for line in USE.splitlines())
    started: list[Any] = [
        subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"XPNN_CACHE_DIR": str(folder)}, stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    assert [p.communicate(timeout=240)[0] for p in started] == [b"right\n"] * 4
    assert len(modules(folder, "softmax_")) == 1
    assert [*folder.rglob("*.tmp")] == []


def test_users_own_folder(python: Callable[..., str], tmp_path: Path) -> None:
    """Without XPNN_CACHE_DIR, the platform's cache folder for users."""
    if sys.platform != "linux":
        pytest.skip("XDG_CACHE_HOME is Linux's")
    code = f"import os\nos.environ.pop('XPNN_CACHE_DIR', None)\nimport numpy as np, xpnn\nprint(xpnn.relu(np.ones({1})))"
    assert python(code, XDG_CACHE_HOME=str(tmp_path)) == "[1.]\n"
    assert stat.S_IMODE((tmp_path / "xpnn").stat().st_mode) == 0o700
    assert modules(tmp_path / "xpnn", "relu_")
