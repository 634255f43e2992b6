"""xpnn.torch against torch.nn.functional: values, gradients and dtypes."""

from __future__ import annotations

import inspect
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", minversion="2.13", reason="torch 2.13 is not installed: xpnn.torch is not tested")
import torch.nn.functional as F  # noqa: E402, N812
from torch_helpers import CALLS, DTYPES, HALF, LACKING, LOSSES, check, classes, ours, outcome, random, reference, unit  # noqa: E402

from xpnn.torch.ops import ops  # noqa: E402
from xpnn.torch.patch import NAMES  # noqa: E402


def test_every_function_is_called():
    assert {*CALLS} == {*NAMES, *LACKING} == {*ops} == {*ours.__all__} - {"causal_lm_loss", "patch"}


@pytest.mark.parametrize("name", [n for n in CALLS if n not in LACKING and n not in ("gelu", "softplus")])
def test_signature(name):
    """PyTorch's parameters, in its order, with its kinds and defaults; two functions in C have no signature to ask."""
    mine, theirs = (inspect.signature(f).parameters.values() for f in (getattr(ours, name), getattr(F, name)))
    assert [(p.name, p.kind, p.default) for p in mine] == [(p.name, p.kind, p.default) for p in theirs]


@pytest.mark.usefixtures("composed")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients(name, dtype):
    args, kwargs = CALLS[name](dtype)
    coarse = name == "hardsigmoid" and dtype is torch.float64  # whose 1/6 is a float32 in PyTorch
    check(name, args, kwargs, ulps=2.0**28 if coarse else 8.0)
    if name in LOSSES:
        check(name, args, kwargs | {"reduction": "none"})
        check(name, args, kwargs | {"reduction": "sum"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["softmax", "cross_entropy", "gelu", "swiglu", "hardtanh"])
def test_values_and_gradients_fused(name, dtype):
    """The same on the Numba backend."""
    check(name, *CALLS[name](dtype))


@pytest.mark.usefixtures("composed")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {"weight": unit(5, seed=4, grad=False)},
        {"label_smoothing": 0.2},
        {"ignore_index": 2},
        {"weight": unit(5, seed=4, grad=False), "label_smoothing": 0.1, "ignore_index": 1},
    ],
    ids=lambda o: "-".join(o),
)
@pytest.mark.parametrize("shape", [(7, 5), (5,), (3, 5, 4), (2, 5, 3, 2)], ids=str)
def test_cross_entropy_of_classes(shape, options, reduction):
    target = classes(*shape[:-1] if len(shape) == 1 else (shape[0], *shape[2:]), of=5)
    check("cross_entropy", (random(*shape), target), options | {"reduction": reduction})
    if "label_smoothing" not in options:
        check("nll_loss", (random(*shape), target), options | {"reduction": reduction})


@pytest.mark.usefixtures("composed")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(7, 5), (5,), (3, 5, 4)], ids=str)
def test_cross_entropy_of_probabilities(shape, reduction):
    """The target's gradient too; or none of it."""
    options = {"reduction": reduction, "label_smoothing": 0.1, "weight": unit(5, seed=4, grad=False)}
    for grad in (True, False):
        check("cross_entropy", (random(*shape), unit(*shape, seed=1, grad=grad)), options)
    check("cross_entropy", (random(*shape, grad=False), unit(*shape, seed=1)), options)


@pytest.mark.usefixtures("composed")
def test_options_of_the_others():
    x, t, w = random(4, 5), unit(4, 5, seed=1), unit(4, 5, seed=2)
    for reduction in ("mean", "sum", "none"):
        check("mse_loss", (x, t), {"weight": w, "reduction": reduction})
        check("huber_loss", (x, t), {"weight": w, "reduction": reduction})
        check("smooth_l1_loss", (x, t), {"beta": 0.0, "reduction": reduction})
        grown = {"weight": unit(5, seed=3, grad=False), "pos_weight": unit(5, seed=4, grad=False), "reduction": reduction}
        check("binary_cross_entropy_with_logits", (x, t), grown)
    check("kl_div", (x, t), {"reduction": "batchmean"})
    check("kl_div", (x, t), {"log_target": True, "reduction": "batchmean"})
    check("linear_cross_entropy", (random(3), random(5, 3), classes(of=5)), {"label_smoothing": 0.1})
    check("linear_cross_entropy", (random(4, 3), random(5, 3), unit(4, 5, grad=False)), {"weight": unit(5, grad=False)})
    chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2, chunking_method=None)
    check("linear_cross_entropy", (random(5, 3), random(4, 3), classes(5, of=4)), {"options": chunks})


@pytest.mark.usefixtures("composed")
@pytest.mark.filterwarnings("ignore:Implicit dimension:UserWarning")
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_dim_and_dtype(name):
    for shape in [(), (5,), (4, 5), (2, 3, 4), (2, 3, 4, 5)]:
        for dim in range(-len(shape), len(shape)):
            check(name, (random(*shape), dim))
        with pytest.warns(UserWarning, match="dim"):
            ours_, theirs = (getattr(m, name)(random(*shape)) for m in (ours, F))
        torch.testing.assert_close(ours_, theirs)
    check(name, (random(4, 5, dtype=torch.float32), 0), {"dtype": torch.float64})
    narrow = outcome(getattr(ours, name), (random(4, 5), 0), {"dtype": torch.bfloat16})
    theirs = outcome(getattr(F, name), (random(4, 5), 0), {"dtype": torch.bfloat16})
    torch.testing.assert_close(narrow, theirs, rtol=2e-2, atol=2e-2)
    assert getattr(ours, name)(classes(4, of=3), 0, dtype=torch.float32).dtype == torch.float32
    assert getattr(ours, name)(random(2, 3, 4), 1).is_contiguous()


@pytest.mark.usefixtures("composed")
def test_dim_of_any_integers():
    for one in (np.int64(1), torch.tensor(1)):
        for name in ("softmax", "glu"):
            torch.testing.assert_close(*(getattr(m, name)(random(4, 6), one) for m in (ours, F)))


@pytest.mark.usefixtures("composed")
@pytest.mark.parametrize("other", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [n for n in LOSSES if n not in ("nll_loss", "linear_cross_entropy")])
def test_mixed_dtypes(name, dtype, other):
    """The result's dtype is PyTorch's, which is not always what the arguments' promote to."""
    if {dtype, other} == {*HALF}:
        return
    x, t = random(4, 5, dtype=dtype, grad=False), unit(4, 5, seed=1, dtype=other, grad=False)
    weights = [{}]
    if name in ("huber_loss", "mse_loss", "binary_cross_entropy_with_logits"):
        weights.append({"weight": unit(4, 5, seed=2, grad=False)})
    for options in weights:
        for reduction in ("mean", "none"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # PyTorch's, of kl_div's "mean"
                mine, theirs = (getattr(m, name)(x, t, reduction=reduction, **options) for m in (ours, F))
            torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("composed")
def test_deprecated_arguments():
    x, t = random(4, 5), classes(4, of=5)
    for old in ({"size_average": False}, {"reduce": False}, {"size_average": True, "reduce": True}):
        with pytest.warns(UserWarning, match="deprecated"):
            mine, theirs = (m.cross_entropy(x, t, **old) for m in (ours, F))
        torch.testing.assert_close(mine, theirs)


@pytest.mark.usefixtures("composed")
def test_corners():
    x, t = random(4, 5), classes(4, of=5)
    for reduction in ("mean", "sum", "none"):
        check("cross_entropy", (x, torch.full((4,), -100)), {"reduction": reduction})
        check("cross_entropy", (random(0, 5), classes(0, of=5)), {"reduction": reduction})
    check("cross_entropy", (x, t.byte()))
    one = x[0].detach(), t[:1]
    torch.testing.assert_close(ours.cross_entropy(*one), F.cross_entropy(*one))
    check("cross_entropy", (x, t), {"label_smoothing": -0.5})
    check("softmax", (random(0, 5), 1))
    with pytest.warns(UserWarning, match="broadcast"):
        ours.mse_loss(x, x[:1])
    for arg in (x.T, x[:, ::2], x[::2], x[:1].expand(3, 5)):  # not contiguous
        check("tanh", (arg.detach().requires_grad_(),))
        check("softmax", (arg.detach().requires_grad_(), -1))
    wide = random(4, 10)  # of which every other column is used
    ours.cross_entropy(wide[:, ::2], t).backward()
    used = wide.detach()[:, ::2].requires_grad_()
    F.cross_entropy(used, t).backward()
    assert (wide.grad[:, 1::2] == 0).all()
    torch.testing.assert_close(wide.grad[:, ::2], used.grad)


@pytest.mark.usefixtures("composed")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast(name, dtype):
    """Losses are float32 where autocast makes PyTorch's so."""
    args, kwargs = CALLS[name](dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        mine, theirs = (f(*args, **kwargs) for f in (getattr(ours, name), reference(name)))
    assert mine.dtype == theirs.dtype
    torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)
    mine.sum().backward()
    assert args[0].grad.dtype == dtype


@pytest.mark.usefixtures("composed")
def test_float16_keeps_what_the_scale_of_a_loss_saves():
    """A gradient below float16's range, times 65536: computed for the cotangent that comes, not scaled afterwards."""
    x, t = (torch.zeros(4096, 64, dtype=torch.float16, requires_grad=True), torch.zeros(4096, dtype=torch.int64))
    (ours.cross_entropy(x, t).float() * 4096).backward()
    assert x.grad[0, 1].item() == pytest.approx(1 / 64, rel=1e-3)
    (dx,) = torch.autograd.grad(ours.cross_entropy(x, t), x)
    assert dx[0, 1].item() == pytest.approx(1 / 64 / 4096, rel=0.1)


@pytest.mark.usefixtures("composed")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_cross_entropy_of_anything(data):
    """Shapes, strides and options, each against PyTorch in float64."""
    draw = data.draw
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    rows, columns = ([], shape[0]) if len(shape) == 1 else ([shape[0], *shape[2:]], shape[1])
    seed, order = draw(st.integers(0, 99)), draw(st.permutations(range(len(shape))))
    stored = random(*(shape[k] for k in order), seed=seed, grad=False)  # in memory, the axes lie in any order
    logits = stored.permute(*(order.index(k) for k in range(len(shape)))).requires_grad_(draw(st.booleans()))
    index = draw(st.booleans())
    target = classes(*rows, of=columns, seed=seed) if index else unit(*shape, seed=seed, grad=draw(st.booleans()))
    options = {
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.3])),
        "weight": unit(columns, grad=False) if draw(st.booleans()) else None,
    }
    if index:
        options["ignore_index"] = draw(st.integers(-1, columns))
    if logits.requires_grad or target.requires_grad:
        check("cross_entropy", (logits, target), options, terms=1.0)
    else:
        torch.testing.assert_close(*(m.cross_entropy(logits, target, **options) for m in (ours, F)), equal_nan=True)
