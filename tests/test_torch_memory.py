"""xpnn.torch's memory: tensors that are arrays, and what is kept for a backward pass."""

from __future__ import annotations

import tracemalloc

import pytest

torch = pytest.importorskip("torch", minversion="2.13", reason="torch 2.13 is not installed: xpnn.torch is not tested")
from torch_helpers import DTYPES, classes, ours, random  # noqa: E402

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
