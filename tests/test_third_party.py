"""A backend of another package: the documents' example, installed and checked."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

DOCUMENT = (Path(__file__).parent.parent / "docs" / "backends.md").read_text("utf-8")


def install(folder: Path, code: str) -> None:
    """Lay out what pip would, for a package with the example's entry point."""
    (toml,) = re.findall(r"^```toml\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    ((name, value),) = tomllib.loads(toml)["project"]["entry-points"]["xpnn.backends"].items()
    info = folder / "example_backend-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: example-backend\nVersion: 1.0\n", "utf-8")
    (info / "entry_points.txt").write_text(f"[xpnn.backends]\n{name} = {value}\n", "utf-8")
    (folder / f"{value.partition(':')[0]}.py").write_text(code, "utf-8")


@pytest.fixture
def example() -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    return code


def parity(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = f"import sys; sys.path.insert(0, {str(folder)!r}); from xpnn.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-P", "-c", command, *arguments], capture_output=True, text=True, timeout=240, check=False
    )


def test_the_example_conforms(tmp_path: Path, example: str) -> None:
    install(tmp_path, example)
    done = parity(tmp_path, "parity", "--backend", "example", "--kernel", "softmax")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "9 of 9 within their bounds" in done.stdout
    refused = parity(tmp_path, "parity", "--backend", "example", "--kernel", "relu")
    assert refused.returncode == 1
    assert "Error: relu: backend 'example' knows no le, where; use backend 'auto'" in refused.stderr


def test_a_wrong_one_does_not(tmp_path: Path, example: str) -> None:
    wrong = example.replace('"exp": np.exp', '"exp": lambda a: np.exp(a) * (1 + 1e-5)')
    assert wrong != example
    install(tmp_path, wrong)
    done = parity(tmp_path, "parity", "--backend", "example", "--kernel", "log_softmax")
    assert done.returncode == 1
    assert "breach" in done.stdout


def test_one_that_cannot_be_loaded(tmp_path: Path, python: Callable[..., str]) -> None:
    """It is said where it is asked for, and disturbs nothing else."""
    install(tmp_path, "import nothing_of_that_name")
    setup = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import numpy as np, xpnn\n"
    assert python(setup + "print(xpnn.softmax(np.zeros(2)))").split() == ["[0.5", "0.5]"]
    error = python(setup + "xpnn.set_backend('example'); xpnn.softmax(np.zeros(2))", fails=True)
    assert "BackendError: backend 'example' (example_backend:Example) cannot be loaded: No module named" in error
    info = parity(tmp_path, "info")
    assert info.returncode == 0
    assert "example: not available: backend 'example'" in info.stdout
