"""xpnn.torch against torch.nn.functional: values, gradients, dtypes, errors, and what PyTorch does with an operator."""

from __future__ import annotations

import inspect
import math
import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", minversion="2.13", reason="torch 2.13 is not installed: xpnn.torch is not tested")
import torch.nn.functional as F  # noqa: E402, N812
from torch.utils.checkpoint import checkpoint  # noqa: E402

import xpnn  # noqa: E402
import xpnn.torch  # noqa: E402
from xpnn.torch.arrays import array, tensor  # noqa: E402
from xpnn.torch.ops import ops  # noqa: E402
from xpnn.torch.patch import NAMES  # noqa: E402

ours = xpnn.torch
HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float64, torch.float32, *HALF)


@pytest.fixture
def composed():
    """No compiling: what lies between tensors and kernels is the same for all backends."""
    with xpnn.use_backend("numpy"):
        yield


def random(*shape, seed=0, dtype=torch.float64, grad=True):
    values = torch.from_numpy(np.array(np.random.default_rng(seed).standard_normal(shape))).to(dtype)
    return values.requires_grad_(grad)


def unit(*shape, seed=0, dtype=torch.float64, grad=True):
    return torch.sigmoid(random(*shape, seed=seed, grad=False)).to(dtype).requires_grad_(grad)


def classes(*shape, of, seed=3):
    return torch.from_numpy(np.asarray(np.random.default_rng(seed).integers(0, of, shape)))


def outcome(function, args, kwargs, seed=9):
    """A function's value, and its gradients for a random cotangent."""
    args, kwargs = ([fresh(a) for a in args], {n: fresh(a) for n, a in kwargs.items()})
    y = function(*args, **kwargs)
    leaves = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.requires_grad]
    y.backward(random(*y.shape, seed=seed, grad=False).to(y.dtype))
    return y.detach(), [a.grad for a in leaves]


def fresh(a):
    return a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a


def wider(a):
    return a.detach().double().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) and a.is_floating_point() else a


LACKING = {  # in PyTorch
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "geglu": lambda gate, up, approximate="none": F.gelu(gate, approximate=approximate) * up,
}


def reference(name):
    return LACKING.get(name) or getattr(F, name)


def check(name, args, kwargs=None, ulps=8.0, terms=0.0):
    """Ours against PyTorch's: dtypes those of the same call, values those of one in float64.

    `terms` is the size of what a result is a difference of.
    """
    kwargs = kwargs or {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch's, of kl_div's "mean"
        y, gradients = outcome(getattr(ours, name), args, kwargs)
        theirs, their_gradients = outcome(reference(name), args, kwargs)
        wide = [wider(a) for a in args], {n: wider(a) for n, a in kwargs.items()}
        truth, true_gradients = outcome(reference(name), *wide)
    for got, like, want in zip([y, *gradients], [theirs, *their_gradients], [truth, *true_gradients], strict=True):
        assert got.dtype == like.dtype
        assert got.shape == like.shape
        # the cotangent is rounded to y's dtype for us, and not for the truth
        tolerance = ulps * torch.finfo(min(y.dtype, got.dtype, key=lambda t: -torch.finfo(t).eps)).eps
        scale = max(terms, float(want.abs().nan_to_num().max())) if want.numel() else 0.0
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


# --- the same numbers ---

CALLS = {
    "relu": lambda t: ((random(4, 5, dtype=t),), {}),
    "sigmoid": lambda t: ((random(4, 5, dtype=t),), {}),
    "tanh": lambda t: ((random(4, 5, dtype=t),), {}),
    "leaky_relu": lambda t: ((random(4, 5, dtype=t), 0.2), {}),
    "elu": lambda t: ((random(4, 5, dtype=t),), {"alpha": 1.5}),
    "selu": lambda t: ((random(4, 5, dtype=t),), {}),
    "celu": lambda t: ((random(4, 5, dtype=t), 2.0, False), {}),
    "gelu": lambda t: ((random(4, 5, dtype=t),), {"approximate": "tanh"}),
    "silu": lambda t: ((random(4, 5, dtype=t),), {}),
    "mish": lambda t: ((random(4, 5, dtype=t),), {}),
    "softplus": lambda t: ((random(4, 5, dtype=t), 2.0), {"threshold": 3.0}),
    "hardtanh": lambda t: ((random(4, 5, dtype=t), -0.5), {}),
    "hardsigmoid": lambda t: ((random(4, 5, dtype=t),), {}),
    "hardswish": lambda t: ((random(4, 5, dtype=t),), {}),
    "relu6": lambda t: (((8 * random(4, 5, dtype=t, grad=False)).requires_grad_(),), {}),
    "swiglu": lambda t: ((random(4, 5, dtype=t), random(4, 5, seed=1, dtype=t)), {}),
    "geglu": lambda t: ((random(4, 5, dtype=t), random(4, 5, seed=1, dtype=t)), {"approximate": "tanh"}),
    "glu": lambda t: ((random(4, 6, dtype=t), 1), {}),
    "layer_norm": lambda t: ((random(4, 5, dtype=t), (5,), random(5, seed=1, dtype=t)), {"bias": random(5, seed=2, dtype=t)}),
    "rms_norm": lambda t: ((random(4, 5, dtype=t), (5,), random(5, seed=1, dtype=t), 1e-3), {}),
    "softmax": lambda t: ((random(4, 5, dtype=t), 1), {}),
    "log_softmax": lambda t: ((random(4, 5, dtype=t), -1), {}),
    "cross_entropy": lambda t: ((random(4, 5, dtype=t), classes(4, of=5)), {}),
    "linear_cross_entropy": lambda t: (
        (random(6, 3, dtype=t), random(5, 3, seed=1, dtype=t), classes(6, of=5)),
        {"linear_bias": random(5, seed=2, dtype=t)},
    ),
    "nll_loss": lambda t: ((random(4, 5, dtype=t), classes(4, of=5)), {}),
    "mse_loss": lambda t: ((random(4, 5, dtype=t), random(4, 5, seed=1, dtype=t)), {}),
    "huber_loss": lambda t: ((random(4, 5, dtype=t), random(4, 5, seed=1, dtype=t)), {"delta": 0.7}),
    "smooth_l1_loss": lambda t: ((random(4, 5, dtype=t), random(4, 5, seed=1, dtype=t)), {"beta": 0.7}),
    "kl_div": lambda t: ((random(4, 5, dtype=t), unit(4, 5, seed=1, dtype=t)), {}),
    "binary_cross_entropy_with_logits": lambda t: ((random(4, 5, dtype=t), unit(4, 5, seed=1, dtype=t)), {}),
}
LOSSES = [n for n in CALLS if "loss" in n or "entropy" in n or n == "kl_div"]


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


# --- errors ---

X, T = random(4, 5, dtype=torch.float32), classes(4, of=5)
WRONG = {
    "classes of another shape": ("cross_entropy", (X, T[:3]), {}),
    "int32 classes": ("cross_entropy", (X, T.int()), {}),
    "bool classes": ("cross_entropy", (X, T > 0), {}),
    "classes too large": ("cross_entropy", (X, T + 5), {}),
    "negative classes": ("nll_loss", (X, T - 9), {}),
    "reduction": ("cross_entropy", (X, T), {"reduction": "avg"}),
    "label_smoothing": ("cross_entropy", (X, T), {"label_smoothing": 1.5}),
    "weight's length": ("cross_entropy", (X, T, torch.ones(4)), {}),
    "weight's dtype": ("cross_entropy", (X, T, torch.ones(5).double()), {}),
    "weight that requires grad": ("cross_entropy", (X, T, torch.ones(5, requires_grad=True)), {}),
    "probabilities of another shape": ("cross_entropy", (X, torch.rand(4, 6)), {}),
    "ignore_index": ("cross_entropy", (X, torch.rand(4, 5)), {"ignore_index": 1}),
    "class axis": ("cross_entropy", (random(2, 3, 5), torch.zeros(2, 3).long()), {}),
    "a list": ("cross_entropy", ([[1.0, 2.0]], T), {}),
    "an array": ("cross_entropy", (np.ones((4, 5)), T), {}),
    "a complex tensor": ("cross_entropy", (X.to(torch.complex64), T), {}),
    "a sparse tensor": ("cross_entropy", (X.detach().to_sparse(), T), {}),
    "dim": ("softmax", (X, 2), {}),
    "dim of nothing": ("softmax", (torch.tensor(1.0), 1), {}),
    "dim's type": ("softmax", (X, 1.0), {}),
    "shapes": ("mse_loss", (X, X[:, :4]), {}),
    "shape of a weight": ("mse_loss", (X, X), {"weight": torch.ones(4, 1)}),
    "shape of yes and no": ("binary_cross_entropy_with_logits", (X, X[:1]), {}),
    "delta": ("huber_loss", (X, X), {"delta": 0.0}),
    "bounds": ("hardtanh", (X, 1.0, 0.5), {}),
    "alpha": ("celu", (X,), {"alpha": 0.0}),
    "approximate": ("gelu", (X,), {"approximate": "erf"}),
    "beta": ("smooth_l1_loss", (X, X), {"beta": -1.0}),
    "dimensions": ("linear_cross_entropy", (random(2, 3, 5), random(7, 5), T), {}),
    "features": ("linear_cross_entropy", (X, torch.randn(7, 4), T), {}),
    "bias": ("linear_cross_entropy", (X, torch.randn(7, 5), T), {"linear_bias": torch.randn(6)}),
}


@pytest.mark.usefixtures("composed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", WRONG)
def test_errors_are_pytorchs_kinds(case):
    """What PyTorch refuses is refused, by an error that catching PyTorch's catches too, and that says what was expected."""
    name, args, kwargs = WRONG[case]

    def run(module):
        y = getattr(module, name)(*args, **kwargs)
        y.sum().backward()

    with pytest.raises(Exception) as theirs:  # noqa: PT011  (whichever it is)
        run(F)
    kind = RuntimeError if isinstance(theirs.value, NotImplementedError) else type(theirs.value)
    with pytest.raises(kind, match="expected"):
        run(ours)


@pytest.mark.parametrize("name", ["relu", "sigmoid", "tanh"])
def test_integers_are_refused(name):
    with pytest.raises(TypeError, match=r"got dtype torch\.int64, expected floating"):
        getattr(ours, name)(torch.tensor([1, 2]))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # PyTorch's own, in torch.func.jvp
def test_not_served_by_name():
    with pytest.raises(ValueError, match="inplace: got True"):
        ours.relu(X, inplace=True)
    with pytest.raises(ValueError, match="linear_weight: got 3 dimensions"):
        ours.linear_cross_entropy(X, random(3, 2, 5), T)
    with pytest.raises(RuntimeError, match="functorch"):  # of operators of torch.library, which have no torch.func.grad
        torch.func.grad(lambda x: ours.cross_entropy(x, T))(X.detach())
    with pytest.raises(RuntimeError, match="tangent"):
        torch.func.jvp(lambda x: ours.softmax(x, 1), (X.detach(),), (X.detach(),))


def test_without_torch(python):
    said = python("import sys; sys.modules['torch'] = None\nimport xpnn.torch", fails=True)
    assert "xpnn.torch needs PyTorch" in said


# --- memory ---


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


# --- what PyTorch does with operators ---


def sample(op):
    """Arguments of an operator."""
    args, kwargs = CALLS[op.name](torch.float32)
    if op.name == "glu":  # its operator takes the halves
        args = [half.detach().clone().requires_grad_() for half in args[0].chunk(2, 1)]
    tensors = [a for a in args if isinstance(a, torch.Tensor)] + [kwargs[n] for n in op.inputs if n in kwargs]
    return (*tensors, *[None] * (len(op.inputs) - len(tensors)), *op.defaults.values())


OPERATORS = [(n, s) for n in CALLS for s in ("", "_backward", *(("_value_and_grad",) if n in LOSSES else ()))]


@pytest.mark.usefixtures("composed")
@pytest.mark.parametrize(("name", "suffix"), OPERATORS, ids=lambda n: n or "forward")
def test_opcheck(name, suffix):
    op, function = ops[name], getattr(torch.ops.xpnn, f"{name}{suffix}").default
    args = sample(op)
    wrt = ",".join(n for n in op.variables if args[op.inputs.index(n)] is not None and n != "target")
    if suffix == "_value_and_grad":
        args = (*args, wrt)
    if suffix == "_backward":
        args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        y = getattr(torch.ops.xpnn, name)(*args)
        count = len(op.inputs)
        read = [a if n in op.reads else None for n, a in zip(op.inputs, args, strict=False)]
        args = (torch.randn_like(y), y if op.reads_output else None, *read, *args[count:], wrt)
    assert {*torch.library.opcheck(function, args).values()} == {"SUCCESS"}


@pytest.mark.usefixtures("composed")
@pytest.mark.parametrize("patched", [False, True], ids=["by name", "patched"])
@pytest.mark.parametrize("name", ["cross_entropy", "log_softmax", "linear_cross_entropy"])
def test_compiled(name, patched):
    """One graph, with our operator in it, and the same numbers; shapes may change."""
    module = F if patched else ours
    seen = []

    def backend(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        seen.extend(str(n.target) for n in graph.graph.nodes)
        return aot_eager(graph, inputs)

    def program(*args):
        return getattr(module, name)(args[0] * 2, *args[1:]).mean() * 3

    torch.compiler.reset()
    with ours.patch() if patched else torch.enable_grad():
        compiled = torch.compile(program, fullgraph=True, backend=backend, dynamic=True)
        for rows in (4, 6):
            args = (
                (random(rows, 5), classes(rows, of=5)) if name == "cross_entropy"
                else (random(rows, 5), 1) if name == "log_softmax"
                else (random(rows, 3), random(5, 3, seed=1), classes(rows, of=5))
            )  # fmt: skip
            got, want = outcome(compiled, args, {}), outcome(program, args, {})
            torch.testing.assert_close(got, want)
    assert any(s.startswith(f"xpnn.{name}") for s in seen), seen


@pytest.mark.usefixtures("composed")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant):
    x, t = random(4, 5), classes(4, of=5)

    def program(x):
        return ours.cross_entropy(ours.tanh(x) * 2, t)

    got = outcome(lambda x: checkpoint(program, x, use_reentrant=reentrant), (x,), {})
    torch.testing.assert_close(got, outcome(program, (x,), {}))


@pytest.mark.usefixtures("composed")
def test_gradcheck():
    target = classes(4, of=5)
    assert torch.autograd.gradcheck(lambda x: ours.cross_entropy(x, target, label_smoothing=0.1), (random(4, 5),))
    assert torch.autograd.gradcheck(lambda x: ours.log_softmax(x, 0), (random(4, 5),))


@pytest.mark.usefixtures("composed")
@pytest.mark.parametrize("name", ["softmax", "cross_entropy"])
def test_no_second_derivative(name):
    """An error as soon as a graph of the gradient is asked for: it would lack a part, whichever inputs it is for."""
    x = random(4, 5)
    y = ours.softmax(x, 1).pow(2).sum() if name == "softmax" else ours.cross_entropy(x, classes(4, of=5))
    with pytest.raises(RuntimeError, match=f"{name}: second derivatives: got create_graph=True, expected False"):
        torch.autograd.grad(y, x, create_graph=True)
    function = {"softmax": lambda v: ours.softmax(v, 1).pow(2).sum()}.get(
        name, lambda v: ours.cross_entropy(v, classes(4, of=5))
    )
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.functional.hessian(function, x.detach())
    with ours.patch(), pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.functional.hessian(lambda v: F.silu(v).sum(), x.detach())


@pytest.mark.usefixtures("composed")
def test_seen_by_what_looks():
    """Tracing, fake and meta tensors, subclasses get the registered operators."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda x: ours.softmax(x, 1))(X.detach()).graph
    assert "xpnn.softmax.default" in [str(n.target) for n in graph.nodes]
    assert ours.softmax(torch.empty(3, 4, device="meta"), 1).shape == (3, 4)
    with FakeTensorMode():
        x = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
        loss = ours.cross_entropy(x, torch.zeros(3, dtype=torch.int64))
        assert (loss.dtype, loss.shape) == (torch.bfloat16, ())
        assert ours.cross_entropy(x, torch.zeros(3, dtype=torch.int64), reduction="none").shape == (3,)

    class Mine(torch.Tensor):
        pass

    assert type(ours.tanh(X.detach().as_subclass(Mine))) is Mine
    torch.testing.assert_close(torch.func.vmap(lambda r: ours.softmax(r, 0))(X.detach()), X.detach().softmax(1))
    exported = torch.export.export(torch.nn.Sequential(Softmax()), (X.detach(),))
    assert "xpnn.softmax.default" in [str(n.target) for n in exported.graph.nodes]


class Softmax(torch.nn.Module):
    def forward(self, x):
        return ours.softmax(x, 1)


# --- in PyTorch's place ---


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
        torch.testing.assert_close(torch.func.vmap(lambda r: F.softmax(r, 0))(x), x.softmax(1))
        torch.testing.assert_close(torch.func.grad(lambda x: F.softmax(x, 1)[0, 0])(x)[1:], torch.zeros(3, 5))
        _, tangent = torch.func.jvp(lambda x: F.softmax(x, 1), (x,), (x,))
        assert tangent.abs().max() > 0
        F.cross_entropy(x, torch.rand(4, 5), weight).backward()
        assert weight.grad is not None
        assert F.linear_cross_entropy(x, random(3, 2, 5, dtype=torch.float32), torch.zeros(4, 2).long()).shape == ()
        with pytest.raises(IndexError, match="expected 0 <= target"):
            F.cross_entropy(x, T + 5)


# --- language models ---


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


def test_no_rows_count():
    assert math.isnan(ours.causal_lm_loss(random(1, 3, 4), torch.full((1, 3), -100), 4).item())
