"""xpnn.torch's memory: tensors that are arrays, and what is kept for a backward pass."""

from __future__ import annotations

import tracemalloc

import pytest

torch = pytest.importorskip("torch", minversion="2.13", reason="torch 2.13 is not installed: xpnn.torch is not tested")
import torch.nn.functional as F  # noqa: E402, N812
from torch_helpers import CALLS, DTYPES, LACKING, LOSSES, check, classes, ours, random, unit  # noqa: E402

import xpnn  # noqa: E402
from xpnn.torch.arrays import array, tensor  # noqa: E402


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_are_the_tensors(dtype):
    t = random(6, 8, dtype=dtype, grad=False)
    for view in (t, t.T, t[::2, 1::3], t[0], t[0, 0]):
        a = array(view)
        assert a.__array_interface__["data"][0] == view.data_ptr()
        assert a.strides == tuple(s * view.itemsize for s in view.stride())
        back = tensor(a)
        assert (back.dtype, back.data_ptr(), back.shape) == (dtype, view.data_ptr(), view.shape)


ACTIVATIONS = [n for n in CALLS if n not in (*LOSSES, *LACKING, "glu", "softmax", "log_softmax", "layer_norm", "rms_norm")]
LAYOUTS = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "one image, channels last": lambda x: x[:1].to(memory_format=torch.channels_last),
    "half of the channels": lambda x: x.to(memory_format=torch.channels_last)[:, 1:],
    "every other row": lambda x: x.to(memory_format=torch.channels_last)[:, :, ::2],
    "permuted": lambda x: x.permute(3, 1, 0, 2),
    "transposed": lambda x: x[0, 0].T,
    "expanded": lambda x: x[:1].transpose(1, 3).expand(2, 5, 4, 3),
}


@pytest.mark.usefixtures("composed")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_layout_is_kept(name, layout):
    """Results and gradients lie as PyTorch's do: channels last stays channels last."""
    for dtype in (torch.float32, torch.bfloat16):
        x = LAYOUTS[layout](random(2, 3, 4, 5, dtype=dtype, grad=False))
        found = []
        for module in (ours, F):
            leaf = x.detach().requires_grad_()
            y = getattr(module, name)(leaf)
            like = torch.empty_like(y).copy_(random(*y.shape, seed=1, grad=False))
            expanded = torch.ones((), dtype=dtype).expand(y.shape)  # as of y.sum()
            found.append([y.detach(), *(torch.autograd.grad(y, leaf, dy, retain_graph=True)[0] for dy in (like, expanded))])
        for mine, theirs in zip(*found, strict=True):
            assert mine.stride() == theirs.stride()
            torch.testing.assert_close(mine, theirs, rtol=1.6e-2, atol=1e-2)


@pytest.mark.usefixtures("composed")
def test_layout_of_gates_and_losses():
    """That of the first tensor, gradients as well; the order of PyTorch's losses' gradients is another matter."""
    x, t, w = (random(2, 4, 3, 5, seed=k).detach().to(memory_format=torch.channels_last).requires_grad_() for k in range(3))
    assert ours.glu(x, 1).stride() == F.glu(x, 1).stride() != ours.glu(x.contiguous(), 1).stride()
    for name, args in (("swiglu", (x, t)), ("mse_loss", (x, t)), ("kl_div", (x, t)), ("huber_loss", (x, t))):
        for reduction in ("none", "mean") if name in LOSSES else ("",):
            y = getattr(ours, name)(*args, **({"reduction": reduction} if reduction else {}))
            gradients = torch.autograd.grad(y, args, torch.ones_like(y))
            assert {v.stride() for v in (y, *gradients) if v.dim()} == {x.stride()}
    check("binary_cross_entropy_with_logits", (x, t.detach().sigmoid()), {"weight": w.detach().abs(), "reduction": "none"})
    check("mse_loss", (x, t), {"weight": w})
    check("swiglu", (x, t.detach().contiguous().requires_grad_()))
    check("swiglu", (x.detach().contiguous().requires_grad_(), t))
    column = unit(5, grad=False)  # of another shape: all is as if it were contiguous
    assert ours.binary_cross_entropy_with_logits(x, t.detach().sigmoid(), column, reduction="none").is_contiguous()


def test_layout_without_a_copy(monkeypatch):
    """The kernel gets the tensor's memory in the order in which it lies, and its result may be written to."""
    seen = []
    call = xpnn.Kernel.__call__
    monkeypatch.setattr(xpnn.Kernel, "__call__", lambda k, *a, **b: seen.extend(a) or call(k, *a, **b))
    x = random(2, 3, 4, 5).detach().to(memory_format=torch.channels_last).requires_grad_()
    with xpnn.use_backend("numpy"):
        y = ours.silu(x)
        y.mul_(2).sum().backward()
    assert seen[0].flags.c_contiguous
    assert seen[0].__array_interface__["data"][0] == x.data_ptr()
    assert x.grad.stride() == x.stride()


def test_the_gradient_is_the_only_large_array():
    """Made by the forward pass, handed on by the backward pass as it is, without another of its size."""
    base, t = random(512, 2000, dtype=torch.float32), classes(512, of=2000)
    held, handed = [], []

    def pack(kept):
        held.append(kept)
        return kept

    ours.cross_entropy(base, t).backward()  # whatever is made once
    logits = base * 1
    logits.register_hook(lambda g: handed.append((g.data_ptr(), g.shape)))
    tracemalloc.start()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
            loss = ours.cross_entropy(logits, t)
        loss.backward()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = logits.numel() * 4
    assert size < peak < 1.1 * size
    assert [k.shape for k in held] == [logits.shape]
    assert handed == [(held[0].data_ptr(), logits.shape)]


def test_scaled_in_place():
    """A cotangent other than 1 is multiplied in, over the gradient; into a new one where the graph is kept."""
    x, t = random(64, 50, dtype=torch.float32), classes(64, of=50)
    held = []

    def pack(kept):
        held.append(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        loss = ours.cross_entropy(x, t)
    (once,) = torch.autograd.grad(loss * 2, x, retain_graph=True)
    (again,) = torch.autograd.grad(loss * 3, x, retain_graph=True)
    (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
    torch.testing.assert_close(once, 2 * plain)
    torch.testing.assert_close(again, 3 * plain)
    (last,) = torch.autograd.grad(loss * 4, x)
    assert last.data_ptr() == held[0].data_ptr()
    torch.testing.assert_close(last, 2 * once)


@pytest.mark.parametrize("loss", [ours.cross_entropy, ours.nll_loss])
def test_gradients_are_their_owners(loss):
    """What an earlier pass has handed out, a later one does not write to; nor does writing to it change the later one."""
    x, t = random(6, 5, dtype=torch.float32), classes(6, of=5)
    value = loss(x, t)
    (first,) = torch.autograd.grad(value, x, retain_graph=True)
    copy = first.clone()
    (second,) = torch.autograd.grad(2 * value, x, retain_graph=True)
    torch.testing.assert_close(first, copy, rtol=0, atol=0)
    first.zero_()
    (third,) = torch.autograd.grad(3 * value, x)
    torch.testing.assert_close(second, 2 * copy)
    torch.testing.assert_close(third, 3 * copy)


def test_nothing_is_kept_where_no_gradient_is_wanted():
    base, t = random(512, 2000, dtype=torch.float32), classes(512, of=2000)
    for context, x in ((torch.no_grad(), base), (torch.inference_mode(), base), (torch.enable_grad(), base.detach())):
        with context:
            ours.cross_entropy(x, t)
            tracemalloc.start()
            try:
                loss = ours.cross_entropy(x, t)
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
        assert not loss.requires_grad
        assert peak < 0.1 * base.numel() * 4
