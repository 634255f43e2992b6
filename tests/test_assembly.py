"""The emitted loops become vector instructions, and call no scalar mathematics."""

import platform
import re

import pytest

import xpnn
from xpnn.backends.numba import cache, emit
from xpnn.backends.prepare import example_task

CASES = [
    ("softmax", "forward"),
    ("softmax", "backward"),
    ("log_softmax", "forward"),
    ("cross_entropy", "value_and_grad"),
    ("sigmoid", "forward"),
    ("tanh", "forward"),
    ("relu", "backward"),
    ("log", "forward"),
]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86 assembly")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("name", "direction"), CASES)
def test_vectorises(name: str, direction: str, dtype: str) -> None:
    """Every load of a row, sum, product and comparison works on a whole register."""
    job = example_task(getattr(xpnn, name), dtype, direction, {}, "numba").job
    text = emit.emit(job.program(), dtype, (), "compiled afresh, for its assembly").text
    call = cache.load(f"assembly_{name}_{direction}", text.replace(", cache=True", "")).call
    (assembly,) = call.inspect_asm().values()
    kind = "ps" if dtype == "float32" else "pd"
    packed = len(re.findall(rf"\b(?:v)?(?:mov[au]|add|sub|mul|max|fn?m\w+?\d*){kind}\b.*[xyz]mm", assembly))
    assert packed >= 4
    assert not re.findall(r"call\S*\s.*\b(?:expf?|logf?|tanhf?)\b", assembly)
    assert not re.findall(r"movabsq\s+\$(?:expf?|logf?|tanhf?)\b", assembly)
