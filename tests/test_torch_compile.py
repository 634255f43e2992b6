"""What PyTorch does with xpnn.torch's operators: compiling, exporting, checkpoints, derivatives of derivatives."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", minversion="2.13", reason="torch 2.13 is not installed: xpnn.torch is not tested")
import torch.nn.functional as F  # noqa: E402, N812
from torch.utils.checkpoint import checkpoint  # noqa: E402
from torch_helpers import CALLS, LOSSES, classes, ours, outcome, random  # noqa: E402

from xpnn.torch.ops import ops  # noqa: E402

X = random(4, 5, dtype=torch.float32)


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
    args, checks = sample(op), {}
    wrt = ",".join(n for n in op.variables if args[op.inputs.index(n)] is not None and n != "target")
    if suffix == "_value_and_grad":
        args = (*args, wrt)
    if suffix == "_backward":
        args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        y = getattr(torch.ops.xpnn, name)(*args)
        count = len(op.inputs)
        read = [a if n in op.reads else None for n, a in zip(op.inputs, args, strict=False)]
        args = (torch.randn_like(y), y if op.reads_output else None, *read, *args[count:], wrt)
        checks = {"test_utils": ("test_schema", "test_faketensor")}  # forward's check of compiling compiles this too
    assert {*torch.library.opcheck(function, args, **checks).values()} == {"SUCCESS"}


def channels_last(*shape, seed=0):
    return random(*shape, seed=seed, dtype=torch.float32, grad=False).to(memory_format=torch.channels_last)


CL, HALVES = channels_last(2, 4, 3, 5), channels_last(2, 8, 3, 5, seed=1).chunk(2, 1)
LAID = {
    "silu": lambda: (CL.clone().requires_grad_(),),
    "relu": lambda: (CL[:, :, ::2].detach().requires_grad_(),),
    "glu": lambda: tuple(h.detach().requires_grad_() for h in HALVES),
    "swiglu": lambda: (CL.clone().requires_grad_(), random(2, 4, 3, 5, dtype=torch.float32)),
    "mse_loss": lambda: (CL.clone().requires_grad_(), HALVES[0], None, "none"),
    "mse_loss_value_and_grad": lambda: (CL, HALVES[0], None, "mean", "x,target"),
    "silu_backward": lambda: (CL + 1, None, CL, "x"),
    "tanh_backward": lambda: (torch.ones(()).expand(CL.shape), CL, None, "x"),
    "swiglu_backward": lambda: (random(2, 4, 3, 5, dtype=torch.float32, grad=False), None, CL, CL, "gate,up"),
}


@pytest.mark.usefixtures("composed")
@pytest.mark.parametrize("name", LAID)
def test_opcheck_of_layouts(name):
    """What is said of strides holds too."""
    assert {*torch.library.opcheck(getattr(torch.ops.xpnn, name).default, LAID[name]()).values()} == {"SUCCESS"}


@pytest.mark.usefixtures("composed")
def test_compiled_layouts():
    """One graph for all sizes; and one where a size is known only when it runs."""
    graphs = []

    def backend(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch.compiler.reset()
    compiled = torch.compile(ours.silu, fullgraph=True, backend=backend, dynamic=True)
    for n in (2, 3, 4):
        x = channels_last(n, n + 6, 5, 7).requires_grad_()
        y = compiled(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert y.stride() == dx.stride() == x.stride()
    assert len(graphs) == 1
    some = torch.tensor([True, False, True])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        selected = torch.compile(lambda x, m: ours.relu(x[m].transpose(0, 1)), fullgraph=True, backend=backend)
        y = selected(random(3, 4, 5, grad=False), some)
    assert y.stride() == F.relu(random(3, 4, 5, grad=False)[some].transpose(0, 1)).stride()


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
