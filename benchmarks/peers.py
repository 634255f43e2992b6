"""Who is timed: fused xpnn, the same formulas composed on NumPy, and on request other libraries' own functions.

Each is used as its documentation recommends, with as many threads as xpnn; compilation is excluded. Those that can
write into given arrays do; the composed formulas cannot. Every result is compared with the fused one before anything
is timed.
"""

from __future__ import annotations

import functools
import importlib
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

import xpnn
from xpnn.backends.choice import use_backend
from xpnn.backends.task import HALF
from xpnn.benchmarks.cases import Array, Case
from xpnn.benchmarks.timing import Contender

OURS, COMPOSED = "xpnn", "numpy"
PEERS = ("scipy", "numexpr", "torch", "torch chunked", "torch.compile", "jax.jit")


class OtherCasesError(LookupError):
    """A contender that is for other kernels."""


class WrongResultError(AssertionError):
    """A contender computes something else than the fused kernel: a mistake in the benchmark or in the kernel."""


def contenders(
    case: Case, arrays: dict[str, Array], peers: Iterable[str] = ()
) -> tuple[dict[str, Contender], dict[str, float], list[str]]:
    """Those who compete in a case, checked against the fused kernel; the seconds of their first calls; why others do not.

    Raises
    ------
    WrongResultError
        Where one differs from the fused result.
    BackendError
        Where the kernel cannot be fused.
    """
    found: dict[str, Contender] = {}
    first_calls: dict[str, float] = {}
    makers: dict[str, Callable[[], Contender]] = {
        OURS: lambda: _own(case, arrays, "numba"),
        COMPOSED: lambda: _own(case, arrays, "numpy"),
    }
    for name in peers:
        make = {"scipy": _scipy, "numexpr": _numexpr, "jax.jit": _jax}.get(name, _torch)
        makers[name] = functools.partial(make, case, arrays, name)
    notes = []
    for name, maker in makers.items():
        start = time.perf_counter()
        try:
            contender = maker()
            with contender.scope():
                contender.call()  # compiles
        except OtherCasesError:
            continue
        except Exception as error:  # a library that is missing or that cannot; a wrong result is found below
            if name in (OURS, COMPOSED):
                raise
            notes.append(f"{case.group}: {name} not measured: {(str(error).strip() or type(error).__name__).splitlines()[0]}")
            continue
        found[name], first_calls[name] = contender, time.perf_counter() - start
    truth = _values(found[OURS])
    for name, contender in found.items():
        if name != OURS:
            _compare(case, name, truth, _values(contender))
    return found, first_calls, notes


def _own(case: Case, arrays: dict[str, Array], backend: str) -> Contender:
    """xpnn on one of its backends; the fused one writes into arrays that a first call has made."""
    kernel, inputs = case.kernel, case.kernel.declaration.inputs
    if case.in_place:
        return Contender(_steps(case, arrays, backend == "numba"), functools.partial(use_backend, backend))
    args: list[Any] = [arrays[n] for n in inputs if n in arrays]
    options: dict[str, Any] = dict(case.options)
    if args and list(arrays)[: len(args)] != list(inputs)[: len(args)]:  # one in the middle is left out
        args, options = [], options | {n: a for n, a in arrays.items() if n in inputs}
    if args[1:] and kernel.declaration.span is not None:
        args.insert(1, None)
    with use_backend(backend):
        run: Callable[..., Any] = kernel if case.direction == "forward" else kernel.value_and_grad
        if case.direction == "backward":
            _, run = kernel.vjp(*args, **options)
            args, options = [arrays["d" + n] for n in kernel.declaration.outputs if "d" + n in arrays], {}
        if backend == "numba":
            first = run(*args, **options)
            out = _buffers(first[1] if case.direction == "value_and_grad" else first)
            if out is not None:
                options["out"] = out
    return Contender(functools.partial(run, *args, **options), functools.partial(use_backend, backend))


def _steps(case: Case, arrays: dict[str, Array], fused: bool) -> Callable[[], Any]:
    """One step after another on arrays of its own, each over what the step before left; composed, with new arrays each time."""
    held = {n: arrays[n].copy() for n in case.kernel.declaration.inputs if n in arrays}
    over, options = case.in_place, dict(case.options)
    if "step" in case.kernel.declaration.options:
        options["step"] = 0

    def step() -> Any:
        if "step" in options:
            options["step"] += 1
        results = case.kernel(*held.values(), **options, out=tuple(held[n] for n in over) if fused else None)
        held.update(zip(over, results, strict=True))
        return results

    return step


def _buffers(results: Any) -> Any:
    """Results as `out`: arrays to write into, None for plain numbers."""
    if isinstance(results, tuple):
        found = tuple(_buffers(r) for r in results)
        return None if all(f is None for f in found) else found
    return results if isinstance(results, np.ndarray) and results.ndim else None


# --- NumPy's neighbours ---------------------------------------------------------------------------------------------


def _scipy(case: Case, arrays: dict[str, Array], name: str) -> Contender:
    """SciPy's own functions, forward alone."""
    special: Any = importlib.import_module("scipy.special")
    functions: dict[str, Callable[..., Any]] = {
        "softmax": functools.partial(special.softmax, axis=-1),
        "log_softmax": functools.partial(special.log_softmax, axis=-1),
        "logsumexp": functools.partial(special.logsumexp, axis=-1),
    }
    (x,) = _alone(case, arrays)
    if case.kernel is xpnn.sigmoid:
        return Contender(functools.partial(special.expit, x, out=np.empty_like(x)))
    if case.kernel.__name__ not in functions:
        raise OtherCasesError
    return Contender(functools.partial(_native(functions, case, "SciPy"), x))


def _numexpr(case: Case, arrays: dict[str, Array], name: str) -> Contender:
    """numexpr's compiled expressions, of functions of one argument."""
    numexpr: Any = importlib.import_module("numexpr")
    from xpnn.backends.numba import pool

    (x,) = _alone(case, arrays)
    expressions = {"sigmoid": "1 / (1 + exp(-x))", "tanh": "tanh(x)", "relu": "where(x <= 0, 0, x)", "log": "log(x)"}
    expressions["silu"] = "x / (1 + exp(-x))"
    expression = expressions.get(case.kernel.__name__)
    if expression is None or case.kernel is not getattr(xpnn, case.kernel.__name__):
        raise OtherCasesError
    numexpr.set_num_threads(pool.count())
    out = np.empty_like(x)
    return Contender(functools.partial(numexpr.evaluate, expression, {"x": x}, {}, out, casting="same_kind"))


def _alone(case: Case, arrays: dict[str, Array]) -> list[Array]:
    """The one array of a forward call that these libraries can take."""
    if case.direction != "forward" or len(arrays) != 1 or case.dtype in HALF:
        raise OtherCasesError
    return list(arrays.values())


# --- other libraries ------------------------------------------------------------------------------------------------


def _torch(case: Case, arrays: dict[str, Array], name: str) -> Contender:
    """PyTorch's own functions, eager or compiled; gradients through autograd, as in training."""
    from xpnn.backends.numba import pool

    torch: Any = importlib.import_module("torch")
    f = torch.nn.functional
    if case.in_place:
        return _torch_steps(torch, case, arrays, name)
    functions: dict[str, Callable[..., Any]] = {
        "softmax": lambda x: torch.softmax(x, -1),
        "log_softmax": lambda x: torch.log_softmax(x, -1),
        "logsumexp": lambda x: torch.logsumexp(x, -1),
        "cross_entropy": f.cross_entropy,
        "nll_loss": f.nll_loss,
        "binary_cross_entropy_with_logits": f.binary_cross_entropy_with_logits,
        "kl_div": f.kl_div,
        "mse_loss": f.mse_loss,
        "huber_loss": f.huber_loss,
        "smooth_l1_loss": f.smooth_l1_loss,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "relu": torch.relu,
        "gelu": f.gelu,
        "layer_norm": lambda x, w, b: f.layer_norm(x, x.shape[-1:], w, b),
        "rms_norm": lambda x, w: f.rms_norm(x, x.shape[-1:], w),
        "silu": f.silu,
        "swiglu": lambda gate, up: f.silu(gate) * up,
        "log": torch.log,
        "linear": lambda x, w, b: torch.relu(f.linear(x, w, b)),
        "linear_cross_entropy": f.linear_cross_entropy,
    }
    if name == "torch chunked":
        if case.kernel.__name__ not in functions or "linear_cross" not in case.kernel.__name__:
            raise OtherCasesError
        options = torch.nn.LinearCrossEntropyOptions()
        functions["linear_cross_entropy"] = functools.partial(f.linear_cross_entropy, options=options)
    into: dict[str, Callable[..., Any]] = {  # the same, into an array
        "softmax": lambda x, y: torch.softmax(x, -1, out=y),
        "log_softmax": lambda x, y: torch.log_softmax(x, -1, out=y),
        "logsumexp": lambda x, y: torch.logsumexp(x, -1, out=y),
        "sigmoid": lambda x, y: torch.sigmoid(x, out=y),
        "tanh": lambda x, y: torch.tanh(x, out=y),
        "relu": lambda x, y: torch.clamp_min(x, 0, out=y),
        "gelu": lambda x, y: torch.ops.aten.gelu.out(x, out=y),
        "silu": lambda x, y: torch.ops.aten.silu.out(x, out=y),
        "swiglu": lambda gate, up, y: torch.mul(f.silu(gate), up, out=y),
        "log": lambda x, y: torch.log(x, out=y),
        "layer_norm": lambda x, w, b, y: torch.ops.aten.native_layer_norm.out(
            x, x.shape[-1:], w, b, 1e-5, out0=y, out1=x.new_empty(len(x), 1), out2=x.new_empty(len(x), 1)
        )[0],
        "linear": lambda x, w, b, y: torch.addmm(b, x, w.T, out=y).relu_(),
    }
    function = _native(functions, case, "PyTorch")
    torch.set_num_threads(pool.count())
    given = [_tensor(torch, arrays[n]) for n in case.kernel.declaration.inputs if n in arrays]
    compiled = name == "torch.compile"
    if compiled:
        torch._dynamo.reset()
        config: Any = importlib.import_module("torch._functorch.config")
        config.donated_buffer = False  # lets a compiled graph run backward more than once
        function = torch.compile(function, dynamic=False)
    call: Callable[..., Any]
    if case.direction == "forward":
        if compiled:
            call = functools.partial(function, *given)
        else:
            y = function(*given)
            into_y = into.get(case.kernel.__name__)
            call = functools.partial(function, *given) if into_y is None else functools.partial(into_y, *given, y)
        return Contender(call, torch.no_grad, reports_memory=False)
    x, *others = given
    names = [n for n in case.kernel.declaration.inputs if n in arrays]
    usual = case.kernel.declaration.default_wrt or (names if case.direction == "backward" else names[:1])
    wrt = [t for n, t in zip(names, given, strict=True) if n in usual]
    for t in wrt:
        t.requires_grad_(True)
    if case.direction == "backward":
        y = function(x, *others)
        dy = _tensor(torch, arrays["dy"])
        call = functools.partial(torch.autograd.grad, y, wrt, dy, retain_graph=True)
    else:

        def call() -> Any:
            loss = function(x, *others)
            return loss.detach(), torch.autograd.grad(loss, wrt)

    return Contender(call, reports_memory=False)


def _torch_steps(torch: Any, case: Case, arrays: dict[str, Array], name: str) -> Contender:
    """PyTorch's own optimiser on one parameter: its fused form where there is one, or its `foreach` form compiled."""
    from xpnn.backends.numba import pool

    if name == "torch chunked" or case.dtype in HALF:  # its states are of half precision too
        raise OtherCasesError
    torch.set_num_threads(pool.count())
    held = {n: _tensor(torch, a.copy()) for n, a in arrays.items()}
    param = torch.nn.Parameter(held["param"])
    param.grad = held["grad"]
    optimizer = {"sgd": "SGD", "adagrad": "Adagrad", "adam": "Adam", "adamw": "AdamW"}[case.kernel.__name__]
    compiled = name == "torch.compile"
    how = {"foreach": True} if compiled else {"fused": True}
    made = getattr(torch.optim, optimizer)([param], lr=case.kernel.declaration.options["lr"], **case.options, **how)
    kept = {"state_sum": "sum"}
    made.state[param] = {kept.get(n, n): held[n] for n in case.in_place[1:]} | {"step": torch.tensor(0.0)}
    step = made.step
    if compiled:
        torch._dynamo.reset()
        step = torch.compile(made.step)

    def call() -> Any:
        step()
        return param, *(made.state[param][kept.get(n, n)] for n in case.in_place[1:])

    return Contender(call, reports_memory=False)


def _tensor(torch: Any, a: Array) -> Any:
    """A tensor over an array's memory."""
    return torch.from_numpy(a.view(np.uint16)).view(torch.bfloat16) if a.dtype.name == "bfloat16" else torch.from_numpy(a)


def _jax(case: Case, arrays: dict[str, Array], name: str) -> Contender:
    """JAX's own functions under jit, each call waiting for its result."""
    from xpnn.backends.numba import pool

    os.environ.setdefault("NPROC", str(pool.count()))  # the size of XLA's thread pool
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax: Any = importlib.import_module("jax")
    jnp = jax.numpy
    jax.config.update("jax_enable_x64", case.dtype == "float64")

    def cross_entropy(x: Any, t: Any) -> Any:
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(x), t[:, None], axis=1))

    functions: dict[str, Callable[..., Any]] = {
        "softmax": jax.nn.softmax,
        "log_softmax": jax.nn.log_softmax,
        "logsumexp": lambda x: jax.nn.logsumexp(x, axis=-1),
        "cross_entropy": cross_entropy,
        "sigmoid": jax.nn.sigmoid,
        "tanh": jnp.tanh,
        "relu": jax.nn.relu,
        "gelu": functools.partial(jax.nn.gelu, approximate=False),
        "silu": jax.nn.silu,
        "swiglu": lambda gate, up: jax.nn.silu(gate) * up,
        "layer_norm": lambda x, w, b: jax.nn.standardize(x, epsilon=1e-5) * w + b,
        "rms_norm": lambda x, w: x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + jnp.finfo(x.dtype).eps) * w,
        "log": jnp.log,
        "linear": lambda x, w, b: jax.nn.relu(x @ w.T + b),
    }
    function = _native(functions, case, "JAX")
    given = [jnp.asarray(arrays[n]) for n in case.kernel.declaration.inputs if n in arrays]
    if case.direction == "forward":
        run = functools.partial(jax.jit(function), *given)
    elif case.direction == "value_and_grad":
        run = functools.partial(jax.jit(jax.value_and_grad(function)), *given)
    else:
        _, pullback = jax.jit(lambda *a: jax.vjp(function, *a))(*given)
        run = functools.partial(jax.jit(lambda p, dy: p(dy)), pullback, jnp.asarray(arrays["dy"]))
    return Contender(lambda: jax.block_until_ready(run()), reports_memory=False)


def _native(functions: dict[str, Callable[..., Any]], case: Case, library: str) -> Callable[..., Any]:
    """A library's function for a case's kernel; a user's own kernel may bear the same name and is not it."""
    function = functions.get(case.kernel.__name__)
    if function is None or case.kernel is not getattr(xpnn, case.kernel.__name__, None):
        raise LookupError(f"{library} has no function of its own for it")
    return function


# --- the check before the race --------------------------------------------------------------------------------------


def _values(contender: Contender) -> list[Array]:
    with contender.scope():
        return list(_flat(contender.call()))


def _flat(results: Any) -> Iterable[Array]:
    if isinstance(results, tuple | list):
        for r in results:
            yield from _flat(r)
    elif results is not None:
        if hasattr(results, "detach"):
            results = results.detach()
            results = results.float() if "16" in str(results.dtype) else results
        values = np.asarray(results)
        yield values.astype(np.float32) if values.dtype.name in HALF else values


def _compare(case: Case, name: str, truth: list[Array], values: list[Array]) -> None:
    """Raise unless results agree as two ways to compute the same may: to find mistakes; `parity` measures errors."""
    relative = {"float64": 1e-11, "float32": 1e-4, "float16": 2.0**-8, "bfloat16": 2.0**-5}[case.dtype]
    if len(truth) != len(values):
        raise WrongResultError(f"{case.name}: {name} gives {len(values)} results, xpnn {len(truth)}")
    for expected, got in zip(truth, values, strict=True):
        if got.shape != expected.shape:
            raise WrongResultError(f"{case.name}: {name} gives shape {got.shape}, xpnn {expected.shape}")
        scale = float(np.max(np.abs(expected), initial=0.0, where=np.isfinite(expected)))
        absolute = (32 * float(np.finfo(expected.dtype).eps) if case.dtype not in HALF else relative) * scale
        if not np.allclose(got, expected, rtol=relative, atol=absolute, equal_nan=True):
            worst = float(np.nanmax(np.abs(got.astype(np.float64) - expected)))
            raise WrongResultError(f"{case.name}: {name} differs from xpnn by up to {worst:.3g}, of values up to {scale:.3g}")
