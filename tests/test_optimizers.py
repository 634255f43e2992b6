"""Optimisers' steps: PyTorch's, step by step; in place; in half precision; and what is refused."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from layouts import frozen
from oracles import ORACLES

import xpnn
from xpnn.backends.arrays import numpy_dtype
from xpnn.testing import record, truth_of, ulps, variants

RNG = np.random.default_rng(9)
STATES = {
    "sgd": (),
    "adagrad": ("state_sum",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
}


def ways() -> list[tuple[str, dict[str, Any], bool]]:
    """An optimiser, its options as PyTorch names them, and whether it is AMSGrad."""
    found: list[tuple[str, dict[str, Any], bool]] = []
    for decay, maximize in itertools.product((0.0, 0.02), (False, True)):
        usual = {"lr": 0.05, "weight_decay": decay, "maximize": maximize}
        for momentum, dampening, nesterov in ((0, 0, False), (0.9, 0, False), (0.9, 0.3, False), (0.9, 0, True)):
            found.append(("sgd", usual | {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}, False))
        found += [("adagrad", usual | {"lr_decay": rate}, False) for rate in (0.0, 0.1)]
        for name, amsgrad in itertools.product(("adam", "adamw"), (False, True)):
            found.append((name, usual | {"betas": (0.8, 0.95), "eps": 1e-6}, amsgrad))
    return found


WAYS = ways()


def ours(name: str, options: dict[str, Any], step: int) -> dict[str, Any]:
    """The options as xpnn names them."""
    found = dict(options)
    if "betas" in found:
        found["beta1"], found["beta2"] = found.pop("betas")
    return found if name == "sgd" else found | {"step": step}


def start(name: str, amsgrad: bool, param: np.ndarray, state: Any = None) -> list[np.ndarray]:
    """The states before the first step."""
    count = len(STATES[name]) + amsgrad
    return [np.zeros(param.shape, state or param.dtype) for _ in range(count)]


def results(found: Any) -> tuple[Any, list[Any]]:
    return (found[0], list(found[1:])) if isinstance(found, tuple) else (found, [])


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "in place"])
@pytest.mark.parametrize(("name", "options", "amsgrad"), WAYS, ids=[f"{n}-{k}" for k, (n, _, _) in enumerate(WAYS)])
def test_ten_steps_of_torch(
    backend: str, load_library: Any, name: str, options: dict[str, Any], amsgrad: bool, inplace: bool
) -> None:
    """Parameters and states after every step, in float64."""
    torch = load_library("torch").xp
    kernel = getattr(xpnn, name)
    param = RNG.normal(size=(3, 5))
    theirs = torch.nn.Parameter(torch.tensor(param))
    more = {"amsgrad": amsgrad} if name.startswith("adam") else {}
    optimizer = {"sgd": "SGD", "adagrad": "Adagrad", "adam": "Adam", "adamw": "AdamW"}[name]
    optimizer = getattr(torch.optim, optimizer)([theirs], **options, **more)
    states = start(name, amsgrad, param)
    for step in range(1, 11):
        grad = RNG.normal(size=param.shape)
        before = param.copy(), [s.copy() for s in states]
        theirs.grad = torch.tensor(grad)
        optimizer.step()
        out = (param, *(states or ([None] if options.get("momentum") else []))) if inplace else None
        out = out[0] if out is not None and len(out) == 1 else out
        moved, kept = results(kernel(param, frozen(grad), *states, **ours(name, options, step), out=out))
        np.testing.assert_allclose(moved, theirs.detach().numpy(), rtol=1e-11, atol=1e-13)
        known = optimizer.state[theirs]
        names = ["momentum_buffer", "sum", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
        wanted = [known[n].numpy() for n in names if known.get(n) is not None]
        assert len(kept) == len(wanted) == len(STATES[name]) + amsgrad + (options.get("momentum", 0) != 0)
        for ours_, theirs_ in zip(kept, wanted, strict=True):
            np.testing.assert_allclose(ours_, theirs_, rtol=1e-11, atol=1e-13)
        if inplace:
            assert moved is param
            assert all(a is b for a, b in zip(kept, states, strict=bool(states)))
        else:
            np.testing.assert_array_equal(param, before[0])
            for old, was in zip(states, before[1], strict=True):
                np.testing.assert_array_equal(old, was)
        param, states = moved, kept


@pytest.mark.parametrize("name", STATES)
def test_ten_steps_of_the_reference(backend: str, name: str) -> None:
    """The same without PyTorch, of every variant."""
    kernel = getattr(xpnn, name)
    for options in kernel.declaration.variants:
        param = wide = RNG.normal(size=7)
        states = wides = start(name, False, param)
        for step in range(1, 11):
            grad = RNG.normal(size=7)
            more = options if name == "sgd" else options | {"step": step}
            param, states = results(kernel(param, grad, *states, **more))
            named = dict(zip((*STATES[name], "momentum_buffer"), wides, strict=False))
            wide, wides = results(ORACLES[name](param=wide, grad=grad, **named, **more))
            for got, want in zip((param, *states), (wide, *wides), strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-13)


def sample(name: str, shape: tuple[int, ...], dtype: Any, states: Any = None) -> list[np.ndarray]:
    """Parameters, gradients and states, as after some steps; sgd's with momentum."""
    param, grad = (np.array(RNG.normal(size=shape), dtype) for _ in range(2))
    return [param, grad, *(np.array(np.abs(RNG.normal(size=shape)), states or dtype) for _ in STATES[name] or ("buffer",))]


OPTIONS: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}, "adagrad": {}, "adam": {}, "adamw": {}}


@pytest.mark.parametrize("name", STATES)
def test_in_place_needs_no_memory(name: str) -> None:
    """The arrays themselves are written, and none besides is made; otherwise as many as there are results."""
    kernel, options = getattr(xpnn, name), OPTIONS[name]
    arrays = sample(name, (256, 1024), np.float32)
    param, grad, *states = arrays
    want = kernel(*(a.copy() for a in arrays), **options)
    addresses = [a.ctypes.data for a in arrays]

    def peak(out: Any) -> int:
        tracemalloc.start()
        found = kernel(param, grad, *states, **options, out=out)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(found) == 1 + len(states)
        return size

    with xpnn.use_backend("numba"):
        kernel(*(a.copy() for a in arrays), **options)  # compiles
        assert peak(None) > 0.9 * (1 + len(states)) * param.nbytes
        assert peak((param, *states)) < 0.01 * param.nbytes
    assert [a.ctypes.data for a in arrays] == addresses
    for got, expected in zip((param, *states), want, strict=True):
        np.testing.assert_array_equal(got, expected)


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "plain": lambda a: a,
    "transposed": lambda a: np.ascontiguousarray(a.T).T,
    "gaps": lambda a: np.stack([a, a], axis=-1)[..., 0],
    "reverse": lambda a: a[::-1].copy()[::-1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", STATES)
def test_layouts_in_place(backend: str, name: str, layout: str) -> None:
    """Whatever the strides, all written are the arrays themselves."""
    kernel, options = getattr(xpnn, name), OPTIONS[name]
    arrays = sample(name, (4, 5, 6), np.float64)
    want = kernel(*(a.copy() for a in arrays), **options)
    param, grad, *states = (LAYOUTS[layout](a) for a in arrays)
    found = kernel(param, grad, *states, **options, out=(param, *states))
    for got, array, expected in zip(found, (param, *states), want, strict=True):
        assert got is array
        np.testing.assert_allclose(got, expected, rtol=1e-15)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,)])
@pytest.mark.parametrize("name", STATES)
def test_small_shapes(backend: str, name: str, shape: tuple[int, ...]) -> None:
    """0-d, empty: arrays of the same shape come back, also in place."""
    kernel, options = getattr(xpnn, name), OPTIONS[name]
    arrays = sample(name, shape, np.float64)
    want = ORACLES[name](**dict(zip(kernel.declaration.inputs, arrays, strict=False)), **options)
    found = kernel(*arrays, **options)
    param, grad, *states = arrays
    again = kernel(param, grad, *states, **options, out=(param, *states))
    for got, written, expected in zip(found, again, want, strict=True):
        assert got.shape == written.shape == shape
        np.testing.assert_allclose(got, expected, rtol=1e-13)
        np.testing.assert_array_equal(got, written)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", STATES)
def test_half_precision(backend: str, name: str, dtype: Any) -> None:
    """The parameter is what float32 gives, rounded once; states are float32, in place too."""
    kernel, options = getattr(xpnn, name), OPTIONS[name]
    param, grad, *states = sample(name, (3, 40), dtype, np.float32)
    wide = kernel(param.astype("f4"), grad.astype("f4"), *states, **options)
    found = kernel(param, grad, *states, **options)
    assert found[0].dtype == dtype
    np.testing.assert_array_equal(found[0].view(np.uint16), wide[0].astype(dtype).view(np.uint16))
    kernel(param, grad, *states, **options, out=(param, *states))
    np.testing.assert_array_equal(param.view(np.uint16), found[0].view(np.uint16))
    for state, new, expected in zip(states, found[1:], wide[1:], strict=True):
        assert new.dtype == np.float32
        np.testing.assert_array_equal(new, expected)
        np.testing.assert_array_equal(state, expected)
    halves = [s.astype(dtype) for s in states]
    assert {s.dtype for s in kernel(param, grad, *halves, **options)[1:]} == {np.dtype("f4")}


@pytest.mark.parametrize("state", ["float16", "float32", "float64"])
@pytest.mark.parametrize("grad", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("param", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes_of_results(backend: str, param: str, grad: str, state: str) -> None:
    """Those of parameter and gradient promoted; states float32 beside half precision; another `out=param` is refused."""
    if {param, grad} == {"float16", "bfloat16"}:
        with pytest.raises(TypeError, match="expected one dtype of half precision"):
            xpnn.sgd(np.ones(3, numpy_dtype(param)), np.ones(3, numpy_dtype(grad)))
        return
    for name in STATES:
        kernel, options = getattr(xpnn, name), OPTIONS[name]
        p, g = (np.ones(3, numpy_dtype(dtype)) for dtype in (param, grad))
        states = [np.ones(3, state) for _ in STATES[name] or ("buffer",)]
        new, *kept = kernel(p, g, *states, **options)
        both = param if param == grad else max(param, grad, key=lambda dtype: int(dtype[-2:]))
        assert new.dtype.name == both
        assert {s.dtype.name for s in kept} == {both if both in ("float32", "float64") else "float32"}
        out = p, *(None for _ in states)
        if both == param:
            assert kernel(p, g, *states, **options, out=out)[0] is p
        else:
            with pytest.raises(TypeError, match=rf"{name}: out.*: got dtype {param}, expected {both}"):
                kernel(p, g, *states, **options, out=out)


def test_the_first_buffer_of_half_precision(backend: str) -> None:
    grad = RNG.normal(size=5).astype(np.float16)
    _, buffer = xpnn.sgd(np.ones(5, np.float16), grad, momentum=0.9)
    assert buffer.dtype == np.float32
    np.testing.assert_array_equal(buffer, grad.astype("f4"))


def test_the_first_buffer_is_no_gradient(backend: str) -> None:
    """It is equal to it, and has memory of its own."""
    param, grad = RNG.normal(size=(2, 5))
    _, buffer = xpnn.sgd(param, grad, momentum=0.9)
    np.testing.assert_array_equal(buffer, grad)
    assert not np.shares_memory(buffer, grad)


@pytest.mark.parametrize("beta2", [0.999, 0.99999])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_single_precision(backend: str, name: str, beta2: float) -> None:
    """Within 2 ULP, of the largest term, of what float64 gives; with `1 - beta2` in float32 the first step would be far off."""
    kernel = getattr(xpnn, name)
    names, zeros = ("param", "grad", "exp_avg", "exp_avg_sq"), np.zeros((40, 50), np.float32)
    for step in (1, 2, 10, 1000):
        arrays = dict(zip(names, sample(name, (40, 50), np.float32), strict=True))
        arrays["exp_avg_sq"] += arrays["exp_avg"] ** 2  # a mean square is no less than the square of a mean
        if step == 1:
            arrays |= {"exp_avg": zeros, "exp_avg_sq": zeros}
        options = {"beta2": beta2, "step": step}
        truth = truth_of(kernel, "forward", arrays, options, "float32")
        found = dict(zip(truth.exact, kernel(**arrays, **options), strict=True))
        spoilt = dict(zip(truth.exact, in_single_precision(kernel, arrays, options), strict=True))
        for n, exact in truth.exact.items():
            assert ulps(found[n], exact, truth.sizes[n], "float32").max() <= 2, (n, step)
        n = "new_exp_avg_sq"
        assert step > 1 or ulps(spoilt[n], truth.exact[n], truth.sizes[n], "float32").max() > 100


def in_single_precision(kernel: Any, arrays: dict[str, np.ndarray], options: dict[str, Any]) -> Any:
    """A step whose options, and what is made of them, are float32."""
    single = {n: np.float32(v) for n, v in (kernel.declaration.options | options).items() if isinstance(v, float)}
    formula = kernel.forward_formula
    results = formula(np, **arrays, max_exp_avg_sq=None, **(options | single))
    return [r for r in results if r is not None]


def test_run_time_numbers_prepare_nothing() -> None:
    """A step's number and a learning rate change with every call: no program, no plan is made for them."""
    arrays = sample("adamw", (30,), np.float64)
    with xpnn.use_backend("numba"):
        xpnn.adamw(*arrays, step=1, lr=0.1)
        xpnn.adamw(*arrays, step=2, lr=0.2)
        known = len(xpnn.adamw._tasks), len(xpnn.adamw._plans)
        found = [xpnn.adamw(*arrays, step=step, lr=1 / step)[0] for step in range(3, 50)]
        assert (len(xpnn.adamw._tasks), len(xpnn.adamw._plans)) == known
        with pytest.raises(ValueError, match=r"adamw: lr: got -0\.1, expected 0 <= lr < inf"):
            xpnn.adamw(*arrays, step=50, lr=-0.1)
    for step, got in zip(range(3, 50), found, strict=True):
        want = ORACLES["adamw"](**dict(zip(("param", "grad", "exp_avg", "exp_avg_sq"), arrays, strict=True)), step=step,
                                lr=1 / step)  # fmt: skip
        np.testing.assert_allclose(got, want[0], rtol=1e-12)


def test_other_libraries(library: Any) -> None:
    """Composed, in the library's own arrays."""
    for name in STATES:
        arrays = sample(name, (3, 4), np.float64)
        kernel, options = getattr(xpnn, name), OPTIONS[name]
        found = kernel(*map(library.array, arrays), **options)
        with xpnn.use_backend("numpy"):
            for got, want in zip(found, kernel(*arrays, **options), strict=True):
                np.testing.assert_allclose(library.numpy(got), want, rtol=1e-13)


@pytest.mark.parametrize("name", STATES)
def test_dask(name: str) -> None:
    """Lazily, block by block."""
    da = pytest.importorskip("dask.array")
    arrays = sample(name, (6, 5), np.float32)
    kernel, options = getattr(xpnn, name), OPTIONS[name]
    found = kernel(*(da.from_array(a, chunks=(4, 5)) for a in arrays), **options)
    for got, want in zip(found, kernel(*arrays, **options), strict=True):
        assert type(got) is da.Array
        np.testing.assert_array_equal(got.compute(), want)


@pytest.mark.parametrize("name", STATES)
def test_what_is_off_is_not_there(name: str) -> None:
    """No weight decay, no operation for it; a step is one pass, which reads and writes each array once."""
    kernel = getattr(xpnn, name)
    variant = next(iter(variants(kernel)))
    arrays = dict(zip(kernel.declaration.inputs, sample(name, (4, 7), np.float32), strict=False))
    counts = {}
    for decay in (0.0, 0.1):
        recorded = record(kernel, arrays, OPTIONS[name] | {"weight_decay": decay}, kernel.declaration.outputs[:2])
        counts[decay] = len(recorded.program.text().splitlines())
    assert counts[0.0] < counts[0.1]
    assert variant.optional == ()
    assert kernel.source().count("launch(runner, stage") == 1


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("sgd", {"lr": -1.0}, "sgd: lr: got -1.0, expected 0 <= lr < inf"),
    ("sgd", {"lr": np.nan}, "sgd: lr: got nan, expected 0 <= lr < inf"),
    ("sgd", {"momentum": -0.5}, "sgd: momentum: got -0.5, expected 0 <= momentum < inf"),
    ("sgd", {"weight_decay": -0.5}, "sgd: weight_decay: got -0.5, expected 0 <= weight_decay < inf"),
    ("sgd", {"dampening": np.nan}, "sgd: dampening: got nan, expected a finite number"),
    ("sgd", {"dampening": -np.inf}, "sgd: dampening: got -inf, expected a finite number"),
    *(
        (name, {option: value}, f"{name}: {option}: got {value}, expected 0 <= {option} < inf")
        for name, options in (
            ("sgd", ("lr", "momentum", "weight_decay")),
            ("adagrad", ("lr", "lr_decay", "weight_decay", "eps")),
            ("adam", ("lr", "eps", "weight_decay")),
            ("adamw", ("lr", "eps", "weight_decay")),
        )
        for option in options
        for value in (np.inf, np.nan)
    ),
    ("adam", {"beta1": np.nan}, "adam: beta1: got nan, expected 0 <= beta1 < 1"),
    ("sgd", {"nesterov": True}, "sgd: nesterov: got True with momentum=0.0 and dampening=0.0, expected a momentum"),
    ("sgd", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "sgd: nesterov: got True with momentum=0.9"),
    ("adagrad", {"lr_decay": -0.5}, "adagrad: lr_decay: got -0.5, expected 0 <= lr_decay < inf"),
    ("adagrad", {"eps": -1e-9}, "adagrad: eps: got -1e-09, expected 0 <= eps < inf"),
    ("adagrad", {"step": 0}, "adagrad: step: got 0, expected step >= 1, the number of this step"),
    ("adam", {"beta1": 1.0}, "adam: beta1: got 1.0, expected 0 <= beta1 < 1"),
    ("adam", {"beta2": -0.1}, "adam: beta2: got -0.1, expected 0 <= beta2 < 1"),
    ("adamw", {"step": -3}, "adamw: step: got -3, expected step >= 1"),
    ("adamw", {"lr": -1e-3}, "adamw: lr: got -0.001, expected 0 <= lr < inf"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD, ids=[f"{n}-{o}" for n, o, _ in BAD])
def test_bad_options(backend: str, name: str, options: dict[str, Any], message: str) -> None:
    """An error that names the argument; nothing was written."""
    arrays = sample(name, (4,), np.float64)
    before = [a.copy() for a in arrays]
    kernel = getattr(xpnn, name)
    made = kernel(*(a.copy() for a in arrays), **OPTIONS[name])  # the same arrays with good options
    assert len(made) == len(arrays) - 1
    with pytest.raises(ValueError, match="expected") as raised:
        kernel(*arrays, **options, out=arrays[0] if name == "sgd" else (arrays[0], *arrays[2:]))
    assert str(raised.value).startswith(message)
    for a, b in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", STATES)
def test_shapes_must_be_equal(backend: str, name: str) -> None:
    """Nothing is broadcast: a parameter would grow."""
    param, grad, *states = sample(name, (3, 4), np.float64)
    kernel = getattr(xpnn, name)
    with pytest.raises(ValueError, match=rf"{name}: grad: got shape \(4,\), expected param's \(3, 4\)"):
        kernel(param, grad[0], *states)
    with pytest.raises(ValueError, match=rf"{name}: {next(iter([*STATES[name], 'momentum_buffer']))}: got shape \(4,\)"):
        kernel(param, grad, *(s[0] for s in states))


def test_no_backward() -> None:
    param, grad = RNG.normal(size=(2, 5))
    with pytest.raises(TypeError, match="sgd: it has no backward"):
        xpnn.sgd.vjp(param, grad)
