"""xpnn.torch.causal_lm_loss, the hook of Transformers."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", minversion="2.13", reason="torch 2.13 is not installed: xpnn.torch is not tested")
import torch.nn.functional as F  # noqa: E402, N812
from torch_helpers import classes, ours, random  # noqa: E402


@pytest.mark.usefixtures("composed")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [None, 17, torch.tensor(17)], ids=["mean", "number", "tensor"])
@pytest.mark.parametrize("shifted", [False, True])
def test_causal_lm_loss(dtype, count, shifted):
    """As Transformers words it: logits as float32, labels one to the left, and a sum over a given count, or a mean."""
    logits, labels = random(3, 6, 11, dtype=dtype), classes(3, 6, of=11)
    labels[0, :4] = -100
    given = {"shift_labels": labels} if shifted else {}
    loss = ours.causal_lm_loss(logits, labels, 11, num_items_in_batch=count, **given, unknown="ignored")
    (dlogits,) = torch.autograd.grad(loss * 2.5, logits)

    wide = logits.detach().double().requires_grad_()
    a, b = (wide, labels) if shifted else (wide[:, :-1], labels[:, 1:])
    total = F.cross_entropy(a.reshape(-1, 11), b.reshape(-1), reduction="sum")
    truth = total / (int((b != -100).sum()) if count is None else 17)
    (want,) = torch.autograd.grad(truth * 2.5, wide)
    assert loss.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    assert dlogits.dtype == dtype
    torch.testing.assert_close(loss.double(), truth.detach(), rtol=1e-6, atol=0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(dlogits.double(), want, rtol=4 * eps, atol=4 * eps * float(want.abs().max()))
    with pytest.raises(TypeError, match="labels"):
        ours.causal_lm_loss(logits, None, 11)


def test_wrong_vocab_size():
    with pytest.raises(ValueError, match="causal_lm_loss: vocab_size: got 12, expected 4, the length of logits' rows"):
        ours.causal_lm_loss(random(2, 3, 4), classes(2, 3, of=4), 12)


def test_no_rows_count():
    assert math.isnan(ours.causal_lm_loss(random(1, 3, 4), torch.full((1, 3), -100), 4).item())
