"""xpnn.torch's functions in the place of PyTorch's."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", minversion="2.13", reason="torch 2.13 is not installed: xpnn.torch is not tested")
import torch.nn.functional as F  # noqa: E402, N812
from torch_helpers import classes, ours, random  # noqa: E402

import xpnn  # noqa: E402
from xpnn.torch.patch import NAMES  # noqa: E402

X, T = random(4, 5, dtype=torch.float32), classes(4, of=5)


def test_patch(monkeypatch):
    """Modules use ours; afterwards PyTorch's own functions are back."""
    calls = []
    original = {n: getattr(F, n) for n in NAMES}
    monkeypatch.setattr(
        xpnn.Kernel, "__call__", lambda k, *a, **b: calls.append(k.__name__) or xpnn.backends.call.forward(k, a, b)
    )
    want = torch.nn.CrossEntropyLoss()(X, T), torch.nn.Softmax(1)(X), torch.nn.Tanh()(X)
    with ours.patch(), torch.no_grad(), xpnn.use_backend("numpy"):
        got = torch.nn.CrossEntropyLoss()(X, T), torch.nn.Softmax(1)(X)
        assert F.cross_entropy.__name__ == "cross_entropy"
    assert calls == ["cross_entropy", "softmax"]
    torch.testing.assert_close(got, want[:2])
    assert {n: getattr(F, n) for n in original} == original


def test_patch_is_undone():
    original = F.cross_entropy
    patch = ours.patch("cross_entropy", "softmax")
    assert F.cross_entropy is not original
    assert F.log_softmax.__module__ == "torch.nn.functional"
    inner = ours.patch("softmax")
    with pytest.raises(RuntimeError, match="undo that first"):
        patch.undo()
    inner.undo()
    patch.undo()
    patch.undo()
    assert F.cross_entropy is original
    with pytest.raises(ValueError, match="names: got 'prelu'"):
        ours.patch("prelu")
    with pytest.raises(ZeroDivisionError), ours.patch():
        1 / 0  # noqa: B018
    assert F.cross_entropy is original


@pytest.mark.usefixtures("composed")
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # PyTorch's own, in torch.func.jvp
def test_patch_leaves_the_rest_to_pytorch():
    """What xpnn does not serve is computed by PyTorch as before."""
    x = X.detach()
    weight = torch.rand(5, requires_grad=True)
    with ours.patch():
        assert F.relu(torch.eye(3).to_sparse()).layout is torch.sparse_coo
        assert F.relu(torch.tensor([-1, 2])).dtype == torch.int64
        y = x.clone()
        assert F.relu(y, inplace=True) is y
        assert F.relu(x.clone(), True).min() == 0
        assert F.hardtanh(y, 0.0, 0.5, True) is y
        assert F.silu(y, inplace=True) is y
        assert F.softmax(torch.empty(2, 3, device="meta"), 1).is_meta
        assert F.mse_loss(x.half(), x.bfloat16()).dtype == torch.float32
        assert F.cross_entropy(x, torch.rand(4, 5), torch.ones(5).double()).dtype == torch.float64
        assert F.binary_cross_entropy_with_logits(x, x.to(torch.complex64)).is_complex()
        torch.testing.assert_close(torch.func.vmap(lambda r: F.softmax(r, 0))(x), x.softmax(1))
        torch.testing.assert_close(torch.func.grad(lambda x: F.softmax(x, 1)[0, 0])(x)[1:], torch.zeros(3, 5))
        _, tangent = torch.func.jvp(lambda x: F.softmax(x, 1), (x,), (x,))
        assert tangent.abs().max() > 0
        F.cross_entropy(x, torch.rand(4, 5), weight).backward()
        assert weight.grad is not None
        assert F.linear_cross_entropy(x, random(3, 2, 5, dtype=torch.float32), torch.zeros(4, 2).long()).shape == ()
        with pytest.raises(IndexError, match="expected 0 <= target"):
            F.cross_entropy(x, T + 5)
