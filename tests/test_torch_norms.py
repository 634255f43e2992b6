"""xpnn.torch's norms: rows of several dimensions, mixed precision and errors."""

from __future__ import annotations

import re
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
import torch.nn.functional as F  # noqa: E402, N812

import xpnn.torch as ours  # noqa: E402


@pytest.mark.usefixtures("composed")
@pytest.mark.parametrize("shape", [(5,), (4, 5), (3, 4, 5)])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_rows_of_several_dimensions(name: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    count = 2 if name == "layer_norm" else 1
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(count)]
    dy = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    found = []
    for module in (ours, F):
        y = getattr(module, name)(x, shape, *weights)
        found.append((y, *torch.autograd.grad(y, (x, *weights), dy)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_weights_in_single_beside_half_precision(name: str) -> None:
    """The result is in the input's dtype, each gradient in that of what it belongs to."""
    x = torch.linspace(-1, 1, 24, dtype=torch.bfloat16).reshape(4, 6).requires_grad_()
    weight = torch.linspace(0.5, 2, 6).requires_grad_()
    y = getattr(ours, name)(x, (6,), weight)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    torch.testing.assert_close(y, getattr(F, name)(x.float(), (6,), weight).bfloat16())


@pytest.mark.parametrize(("call", "message"), [
    (lambda x: ours.layer_norm(x, (2,)), "layer_norm: normalized_shape: got (2,), expected the end of input's shape (2, 3)"),
    (lambda x: ours.layer_norm(x, 3), "layer_norm: normalized_shape: got 3, expected at least one integer in a tuple or list"),
    (lambda x: ours.rms_norm(x, []), "rms_norm: normalized_shape: got []"),
    (lambda x: ours.rms_norm(x, (3,), torch.ones(2)), "rms_norm: weight: got shape (2,), expected normalized_shape's (3,)"),
    (lambda x: ours.rms_norm([1.0], (1,)), "rms_norm: input: got list, expected a tensor"),
    (lambda x: ours.glu(x), "glu: input: got 3 elements along dimension -1, expected an even number"),
    (lambda x: ours.glu(x, None), "glu: dim: got None, expected an integer"),
    (lambda x: ours.glu([1.0, 2.0]), "glu: input: got list, expected a tensor"),
    (lambda x: ours.glu(torch.tensor(1.0)), "glu: dim: got -1"),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call(torch.ones(2, 3))
