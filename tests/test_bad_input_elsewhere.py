"""Bad calls with other libraries' arrays: mixed, immutable, or of a backend that cannot serve them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import xpnn


@pytest.fixture
def torch(load_library: Callable[[str], Any]) -> Any:
    return load_library("torch").xp


@pytest.mark.parametrize("name", ["numba", "numpy"])
def test_backend_that_cannot_serve(torch: Any, name: str) -> None:
    with xpnn.use_backend(name), pytest.raises(xpnn.BackendError) as raised:
        xpnn.softmax(torch.ones(2, 3))
    assert all(piece in str(raised.value) for piece in (name, "torch", "NumPy", "auto"))


def test_mixed_libraries(torch: Any) -> None:
    logits, target = torch.ones(2, 3), np.array([0, 1])
    with pytest.raises(TypeError, match=r"cross_entropy: arrays: got a mix of numpy and torch"):
        xpnn.cross_entropy(logits, target)
    with pytest.raises(TypeError, match=r"target: got list, expected a torch array"):
        xpnn.cross_entropy(logits, [0, 1])
    with pytest.raises(TypeError, match=r"dy: got (a )?ndarray.*torch|mix of numpy and torch"):
        xpnn.softmax.vjp(logits)[1](np.ones((2, 3)))
    out = np.zeros((2, 3))
    with pytest.raises(TypeError, match=r"out: got ndarray, expected a torch array"):
        xpnn.softmax(logits, out=out)
    with pytest.raises(TypeError, match=r"out: got Tensor, expected a numpy array"):
        xpnn.softmax(np.ones((2, 3)), out=logits)
    assert not out.any() and bool((logits == 1).all())


def test_immutable_out(load_library: Callable[[str], Any]) -> None:
    jnp = load_library("jax").xp
    with pytest.raises(TypeError, match=r"softmax: out: got a jax array, expected None: jax arrays cannot be written"):
        xpnn.softmax(jnp.ones((2, 3)), out=jnp.zeros((2, 3)))


def test_complex_elsewhere(load_library: Callable[[str], Any]) -> None:
    xp = load_library("array_api_strict").xp
    with pytest.raises(TypeError, match=r"softmax: x: got dtype .*complex128, expected real numbers"):
        xpnn.softmax(xp.ones((2, 3), dtype=xp.complex128))
