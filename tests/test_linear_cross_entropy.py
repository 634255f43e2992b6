"""linear_cross_entropy: PyTorch's numbers whatever the chunks, on every library, in place, and in little memory."""

from __future__ import annotations

import inspect
import itertools
import pickle
import tracemalloc
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import xpnn
from xpnn import cli

RNG = np.random.default_rng(20)
LCE = xpnn.linear_cross_entropy
N, D, C = 13, 6, 9
HALVES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
NAMES = ("x", "linear_weight", "target", "linear_bias")


def made(
    lead: tuple[int, ...] = (N,), probabilities: bool = False, seed: int = 0, width: int = D, classes: int = C
) -> dict[str, np.ndarray]:
    """Inputs by name; the second of several rows is ignored."""
    rng = np.random.default_rng(seed)
    target = np.abs(rng.standard_normal((*lead, classes))) if probabilities else rng.integers(0, classes, lead)
    if not probabilities and target.size > 1:
        target.flat[1] = -100
    return {
        "x": rng.standard_normal((*lead, width)), "linear_weight": rng.standard_normal((classes, width)), "target": target,
        "linear_bias": rng.standard_normal(classes), "weight": np.exp(rng.standard_normal(classes)),
    }  # fmt: skip


def plain(
    arrays: dict[str, Any], dloss: Any, wide: Any = np.float64, **options: Any
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The loss and the gradients by name, from xpnn's own linear and cross_entropy in one piece."""
    a = {n: v.astype(wide) if v.dtype.kind not in "iu" else v for n, v in arrays.items()}
    with xpnn.use_backend("numpy"):
        logits, through = xpnn.linear.vjp(a["x"], a["linear_weight"], a.get("linear_bias"))
        loss, pullback = xpnn.cross_entropy.vjp(logits, a["target"], weight=a.get("weight"), **options)
        dlogits, dtarget, *_ = pullback(np.asarray(dloss, wide))
        found = dict(zip(("x", "linear_weight", "linear_bias"), through(dlogits), strict=False))
    return loss, found | {"target": dtarget}


def near(got: Any, want: Any, tolerance: float = 1e-12) -> None:
    got, want = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.max(np.abs(want), initial=1e-30))


def both_ways(arrays: dict[str, Any], dloss: Any, array: Any = None, **options: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Loss and gradients by name: of vjp, and of value_and_grad (times the cotangent) where there is one number."""
    array = array or (lambda a: a)
    given = {n: array(a) for n, a in arrays.items()}
    loss, pullback = LCE.vjp(**given, **options)
    found = [(loss, dict(zip(given, pullback(array(dloss)), strict=True)))]
    gradients = LCE.backward(array(dloss), **given, **options)
    found.append((LCE(**given, **options), dict(zip(given, gradients, strict=True))))
    return found


# --- against PyTorch, and against the two kernels that it is made of ----------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 100])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_torch(load_library: Any, backend: str, reduction: str, chunk_size: int | None) -> None:
    torch = load_library("torch").xp
    for probabilities, smoothing, bias, weighted in itertools.product((False, True), (0.0, 0.2), (False, True), (False, True)):
        arrays = made(probabilities=probabilities)
        arrays = {n: a for n, a in arrays.items() if (bias or n != "linear_bias") and (weighted or n != "weight")}
        t = {n: torch.tensor(a, requires_grad=a.dtype.kind == "f" and n != "weight") for n, a in arrays.items()}
        loss = torch.nn.functional.linear_cross_entropy(
            t["x"], t["linear_weight"], t["target"], linear_bias=t.get("linear_bias"), weight=t.get("weight"),
            reduction=reduction, label_smoothing=smoothing,
        )  # fmt: skip
        dloss = RNG.standard_normal(loss.shape)
        (loss * torch.tensor(dloss)).sum().backward()
        want = {n: a.grad.numpy() for n, a in t.items() if a.requires_grad}
        options = {"reduction": reduction, "label_smoothing": smoothing, "chunk_size": chunk_size}
        for ours, gradients in both_ways(arrays, dloss, **options):
            near(ours, loss.detach())
            assert {n for n, g in gradients.items() if g is not None} == want.keys()
            for n in want:
                near(gradients[n], want[n], 1e-11)
        if reduction != "none":
            names = ("x", "linear_weight", "linear_bias")[: 2 + bias]
            for wrt in (None, "linear_weight", ("x",), ("linear_weight", "x"), (*names, *(["target"] * probabilities))):
                ours, found = LCE.value_and_grad(**arrays, **options, wrt=wrt)
                near(ours, loss.detach())
                alone = {wrt: found} if isinstance(wrt, str) else dict(zip(wrt or names, found, strict=True))
                for n, g in alone.items():
                    near(g * dloss, want[n], 1e-11)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lead=st.lists(st.integers(1, 5), max_size=3).map(tuple),
    width=st.integers(1, 7),
    classes=st.integers(1, 9),
    probabilities=st.booleans(),
    left_out=st.sets(st.sampled_from(["linear_bias", "weight"])),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    chunk_size=st.one_of(st.none(), st.integers(1, 130)),
    smoothing=st.sampled_from([0.0, 0.3]),
    z_loss=st.sampled_from([0.0, 0.1]),
    softcap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 5),
)
def test_the_same_as_in_one_piece(
    lead: Any, width: int, classes: int, probabilities: bool, left_out: Any, reduction: str, chunk_size: int | None,
    smoothing: float, z_loss: float, softcap: float | None, seed: int,
) -> None:  # fmt: skip
    arrays = {n: a for n, a in made(lead, probabilities, seed, width, classes).items() if n not in left_out}
    options = {"reduction": reduction, "label_smoothing": smoothing, "z_loss": z_loss, "softcap": softcap}
    dloss = np.random.default_rng(seed).standard_normal(lead if reduction == "none" else ())
    want, gradients = plain(arrays, dloss, **options, axis=-1)
    for backend in ("numpy", "auto"):
        with xpnn.use_backend(backend):
            for loss, found in both_ways(arrays, dloss, **options, chunk_size=chunk_size):
                near(loss, want)
                for n in NAMES:
                    if found.get(n) is not None:
                        near(found[n], gradients[n], 1e-10)


def test_chunks_change_nothing_but_rounding(backend: str) -> None:
    arrays = {n: a.astype("f4") if a.dtype.kind == "f" else a for n, a in made((50,)).items()}
    loss, want = LCE.value_and_grad(**arrays)
    for size in (1, 7, 16, 50, 1000, np.int64(8)):
        (got, found), (again, also) = (LCE.value_and_grad(**arrays, chunk_size=size) for _ in range(2))
        assert [g.tobytes() for g in (got, *found)] == [g.tobytes() for g in (again, *also)]
        near(got, loss, 1e-6)
        for a, b in zip(found, want, strict=True):
            near(a, b, 3e-6)


# --- rows that do not count, and few rows --------------------------------------------------------------------------------


def test_all_rows_ignored(backend: str) -> None:
    arrays = made() | {"target": np.full(N, -100)}
    for reduction, value in (("mean", np.nan), ("sum", 0.0)):
        loss, gradients = LCE.value_and_grad(**arrays, reduction=reduction, chunk_size=4)
        np.testing.assert_array_equal(loss, value)
        for g in gradients:
            assert (g == 0).all()
    assert (LCE(**arrays, reduction="none") == 0).all()


def test_no_rows(backend: str) -> None:
    for probabilities in (False, True):
        arrays = made((0,), probabilities)
        for reduction, value in (("mean", np.nan), ("sum", 0.0)):
            loss, gradients = LCE.value_and_grad(**arrays, reduction=reduction)
            np.testing.assert_array_equal(loss, value)
            assert [g.shape for g in gradients] == [(0, D), (C, D), (C,)]
            assert not any(g.any() for g in gradients)
        assert LCE(**arrays, reduction="none").shape == (0,)


def test_one_class(backend: str) -> None:
    loss, gradients = LCE.value_and_grad(np.ones((4, 3)), np.ones((1, 3)), np.zeros(4, int), chunk_size=3)
    assert loss == 0
    assert not any(g.any() for g in gradients)


def test_nan_in_an_ignored_row(backend: str) -> None:
    """Its own gradient is 0; W's is a product with it, so NaN there, as in PyTorch and in one piece."""
    arrays = made()
    arrays["x"][1] = np.nan
    want, gradients = plain(arrays, 1.0)
    loss, (dx, dw, db) = LCE.value_and_grad(**arrays, chunk_size=4)
    near(loss, want)
    near(dx, gradients["x"])
    near(db, gradients["linear_bias"])
    assert (dx[1] == 0).all()
    assert np.isnan(dw).all()
    assert np.isnan(gradients["linear_weight"]).all()


# --- other libraries -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_elsewhere(library: Any, reduction: str, probabilities: bool) -> None:
    arrays = made((2, 7), probabilities)
    dloss = RNG.standard_normal((2, 7) if reduction == "none" else ())
    want, gradients = plain(arrays, dloss, reduction=reduction, label_smoothing=0.1, axis=-1)
    options = {"reduction": reduction, "label_smoothing": 0.1, "chunk_size": 4}
    for loss, found in both_ways(arrays, dloss, library.array, **options):
        near(library.numpy(loss), want)
        for n in NAMES:
            if found[n] is not None:
                near(library.numpy(found[n]), gradients[n], 1e-11)
    if reduction != "none":
        loss, found = LCE.value_and_grad(**{n: library.array(a) for n, a in arrays.items()}, **options)
        near(library.numpy(loss), want)
        for n, g in zip(("x", "linear_weight", "linear_bias"), found, strict=True):
            near(library.numpy(g) * dloss, gradients[n], 1e-11)


@pytest.mark.parametrize("probabilities", [False, True])
def test_traced(load_library: Any, probabilities: bool) -> None:
    library = load_library("jax")
    import jax

    arrays = made(probabilities=probabilities)
    want, gradients = plain(arrays, 1.0)
    f = jax.jit(lambda given: LCE.value_and_grad(**given, chunk_size=5))
    loss, found = f({n: library.array(a) for n, a in arrays.items()})
    near(library.numpy(loss), want)
    for n, g in zip(("x", "linear_weight", "linear_bias"), found, strict=True):
        near(library.numpy(g), gradients[n], 1e-11)
    if not probabilities:
        out = made()["target"]
        out[0] = C  # not looked at: NaN loss, zero gradient
        loss, (dx, *_) = f({n: library.array(a) for n, a in (arrays | {"target": out}).items() if n != "weight"})
        assert np.isnan(library.numpy(loss))
        assert (library.numpy(dx)[0] == 0).all()
        assert np.isfinite(library.numpy(dx)).all()


@pytest.mark.parametrize("dtype", ["float64", "float32", *HALVES])
@pytest.mark.parametrize("probabilities", [False, True])
def test_cupy(machine: Any, dtype: str, probabilities: bool) -> None:
    """CUDA kernels and products on CuPy's arrays, over host memory."""
    from cuda_helpers import back, on_host

    kind, eps = HALVES.get(dtype, np.dtype(dtype)), float(ml_dtypes.finfo(HALVES.get(dtype, dtype)).eps)
    arrays = {n: a.astype(kind) if a.dtype.kind == "f" else a for n, a in made(probabilities=probabilities).items()}
    for reduction in ("none", "mean"):
        dloss = RNG.standard_normal((N,) if reduction == "none" else ()).astype("f4" if dtype in HALVES else dtype)
        want, gradients = plain(arrays, dloss, reduction=reduction)
        for loss, found in both_ways(arrays, dloss, on_host, reduction=reduction, chunk_size=4):
            assert loss.dtype == ("f4" if dtype in HALVES else dtype)
            near(back(loss), want, 16 * eps)
            for n in NAMES:
                if found[n] is not None:
                    assert found[n].dtype == kind
                    near(back(found[n]), gradients[n], 16 * eps)
    given = {n: on_host(a) for n, a in arrays.items()}
    _, expected = LCE.value_and_grad(**given, chunk_size=4)
    expected = [back(g) for g in expected]
    over = (given["x"], given["linear_weight"], given["linear_bias"])
    _, found = LCE.value_and_grad(**given, chunk_size=4, out=over)
    for f, o, e in zip(found, over, expected, strict=True):
        assert f is o
        np.testing.assert_array_equal(back(f), e)


def test_cupy_looks_at_nothing(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target out of range: NaN loss, zero gradient; an IndexError only where XPNN_CHECK=1 asks for it."""
    from cuda_helpers import back, on_host

    arrays = made()
    arrays["target"][3] = C
    given = {n: on_host(a) for n, a in arrays.items() if n != "weight"}
    fetched: list[Any] = []
    fetch = machine.fetch
    monkeypatch.setattr(machine, "fetch", lambda a: fetched.append(a) or fetch(a))
    loss, (dx, *_) = LCE.value_and_grad(**given, chunk_size=5)
    assert fetched == []
    assert np.isnan(back(loss))
    assert (back(dx)[3] == 0).all()
    monkeypatch.setenv("XPNN_CHECK", "1")
    with pytest.raises(IndexError, match=rf"target\[3\]: got {C}, expected 0 <= target < {C}"):
        LCE(**given)


# --- half precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision(backend: str, dtype: str) -> None:
    arrays = {n: a.astype(HALVES[dtype]) if a.dtype.kind == "f" else a for n, a in made().items()}
    want, gradients = plain(arrays, 1.0)
    loss, found = LCE.value_and_grad(**arrays, chunk_size=4)
    assert loss.dtype == np.float32
    near(loss, want, 1e-6)  # logits are float32
    for n, g in zip(("x", "linear_weight", "linear_bias"), found, strict=True):
        assert g.dtype == HALVES[dtype]
        near(g, gradients[n], float(ml_dtypes.finfo(HALVES[dtype]).eps) / 2 + 1e-5)
    loss, pullback = LCE.vjp(**arrays, reduction="none")
    assert pullback(np.ones(N, "f4"))[0].dtype == HALVES[dtype]


def test_weight_gradients_are_added_up_in_float32(backend: str) -> None:
    """512 chunks of one row round no more than one chunk does; added in bfloat16 they would, by far."""
    arrays = {n: a.astype(HALVES["bfloat16"]) if a.dtype.kind == "f" else a for n, a in made((512,)).items()}
    arrays["x"] += HALVES["bfloat16"].type(2)  # terms of one sign: small ones vanish beside a bfloat16 sum
    _, gradients = plain(arrays, 1.0, reduction="sum")
    want = gradients["linear_weight"]
    one, each = (LCE.value_and_grad(**arrays, reduction="sum", wrt="linear_weight", chunk_size=n)[1] for n in (512, 1))
    errors = [np.abs(g.astype(np.float64) - want).max() for g in (one, each)]
    assert errors[1] <= 1.01 * errors[0] + 1e-4
    near(each, want, 2**-8)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_of_torch(load_library: Any, dtype: str) -> None:
    torch = load_library("torch").xp
    arrays = made((200,))
    given = {n: torch.tensor(a) if n == "target" else torch.tensor(a, dtype=getattr(torch, dtype)) for n, a in arrays.items()}
    wide = {n: a.double().numpy() if n != "target" else arrays[n] for n, a in given.items()}
    want, gradients = plain(wide, 1.0)
    eps = float(torch.finfo(getattr(torch, dtype)).eps)
    for size in (1, None):
        loss, (dx, dw, db) = LCE.value_and_grad(**given, chunk_size=size)
        assert loss.dtype == torch.float32
        near(loss, want, eps)
        for n, g in (("x", dx), ("linear_weight", dw), ("linear_bias", db)):
            assert g.dtype == given[n].dtype
            near(g.double(), gradients[n], 3 * eps)


# --- out=, and bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", *HALVES])
@pytest.mark.parametrize("probabilities", [False, True])
def test_out(backend: str, dtype: str, probabilities: bool) -> None:
    """Fresh, None, over each its own input, and crosswise where shapes allow it: always the same bits."""
    square = made((6,), probabilities, width=6, classes=6)
    arrays = {n: a.astype(HALVES.get(dtype, dtype)) if a.dtype.kind == "f" else a for n, a in square.items()}
    names = ("x", "linear_weight", "linear_bias", *(["target"] * probabilities))
    want = [g.tobytes() for g in LCE.value_and_grad(**arrays, wrt=names, chunk_size=4)[1]]

    def check(choose: Callable[[dict[str, Any]], tuple[Any, ...]]) -> None:
        mine = {n: a.copy() for n, a in arrays.items()}
        out = choose(mine)
        _, found = LCE.value_and_grad(**mine, wrt=names, chunk_size=4, out=out)
        assert [g.tobytes() for g in found] == want
        assert all(o is None or f is o for f, o in zip(found, out, strict=True))
        written = [o for o in out if o is not None]
        assert all(np.array_equal(a, arrays[n]) for n, a in mine.items() if not any(a is o for o in written))

    check(lambda mine: tuple(np.empty_like(mine[n]) for n in names))
    check(lambda mine: tuple(mine[n] for n in names))
    check(lambda mine: (None, mine["linear_weight"], None, *([None] * probabilities)))
    check(lambda mine: (mine["linear_weight"], mine["x"], mine["weight"], *([None] * probabilities)))
    if probabilities:
        check(lambda mine: (mine["target"], None, mine["linear_bias"], mine["x"]))
        check(lambda mine: (mine["x"], mine["target"], None, mine["linear_weight"]))
    check(lambda mine: (np.empty((6, 12), mine["x"].dtype)[:, ::2], None, None, *([None] * probabilities)))


def test_out_of_losses_and_pullbacks(backend: str) -> None:
    arrays = made((C,))
    for reduction, shape in (("none", (C,)), ("mean", ()), ("sum", ())):
        out = np.empty(shape)
        want = LCE(**arrays, reduction=reduction, chunk_size=2)
        assert LCE(**arrays, reduction=reduction, chunk_size=2, out=out) is out
        np.testing.assert_array_equal(out, want)
    want = LCE(**arrays, reduction="none", chunk_size=2)
    over = {n: a.copy() for n, a in arrays.items()}
    np.testing.assert_array_equal(LCE(**over, reduction="none", chunk_size=2, out=over["linear_bias"]), want)
    _, pullback = LCE.vjp(**arrays, reduction="none", chunk_size=2)
    expected = pullback(want)
    x = np.empty_like(arrays["x"])
    found = pullback(want, out=(x, None, None, None, None))
    assert found[0] is x
    np.testing.assert_array_equal(x, expected[0])
    assert found[2] is found[4] is None


def test_out_of_one_row_and_of_leading_dimensions(backend: str) -> None:
    for lead in ((), (2, 3)):
        arrays = made(lead)
        want = LCE.value_and_grad(**arrays, chunk_size=4)[1]
        x = arrays["x"]
        assert LCE.value_and_grad(**arrays, chunk_size=4, wrt="x", out=x)[1] is x
        np.testing.assert_array_equal(x, want[0])


ARRAYS = made((4,))
ROOM = np.zeros((5, D))
ROOM[:4] = ARRAYS["x"]
BAD: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    **{
        f"chunk_size {v!r}": ({"chunk_size": v}, ValueError, ("chunk_size", repr(v), "positive integer or None"))
        for v in (0, -1, True, 1.5, "a")
    },
    "target high": ({"target": np.array([0, 8, 9, 10])}, IndexError, ("target[2]", "got 9", "0 <= target < 9", "-100")),
    "target low": ({"target": np.array([0, 8, 3, -1])}, IndexError, ("target[3]", "got -1")),
    "target long": ({"target": np.zeros(5, int)}, ValueError, ("target", "(5,)", "(4,)")),
    "target 2-d": ({"target": np.zeros((4, 1), int)}, ValueError, ("target", "(4, 1)", "(4,)")),
    "target bool": ({"target": np.ones(4, bool)}, TypeError, ("target", "bool", "integers or floats")),
    "probabilities": ({"target": np.zeros((4, 8))}, ValueError, ("target", "(4, 8)", "(4, 9)")),
    "probabilities 1-d": ({"target": np.zeros(4)}, ValueError, ("target", "(4,)", "(4, 9)")),
    "weight narrow": ({"linear_weight": np.ones((9, 5))}, ValueError, ("linear_weight", "(9, 5)", "(C, 6)")),
    "weight 1-d": ({"linear_weight": np.ones(6)}, ValueError, ("linear_weight", "(6,)", "(C, 6)")),
    "no class": ({"linear_weight": np.ones((0, 6))}, ValueError, ("linear_weight", "(0, 6)", "at least one class")),
    "bias": ({"linear_bias": np.ones(8)}, ValueError, ("linear_bias", "(8,)", "(9,)")),
    "bias 2-d": ({"linear_bias": np.ones((1, 9))}, ValueError, ("linear_bias", "(1, 9)", "(9,)")),
    "class weights": ({"weight": np.ones(4)}, ValueError, ("weight", "(4,)", "(9,)")),
    "x 0-d": ({"x": np.array(1.0)}, ValueError, ("x", "()", "at least one dimension")),
    "softcap 0": ({"softcap": 0}, ValueError, ("softcap", "got 0", "positive")),
    "softcap -1.0": ({"softcap": -1.0}, ValueError, ("softcap", "-1.0", "positive")),
    "reduction": ({"reduction": "avg"}, ValueError, ("reduction", "'avg'", "'mean'")),
    "axis": ({"axis": -1}, TypeError, ("unexpected argument 'axis'",)),
    "overlap": ({"x": ROOM[:4], "out": ROOM[1:]}, ValueError, ("out", "overlaps x")),
    "out narrow": ({"out": np.zeros((4, 5))}, ValueError, ("out", "(4, 5)", "(4, 6)")),
    "out float32": ({"out": np.zeros((4, 6), "f4")}, TypeError, ("out", "float32", "float64")),
    "text": ({"x": ["a"]}, TypeError, ("x", "real numbers")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(backend: str, name: str) -> None:
    change, error, pieces = BAD[name]
    given = ARRAYS | {"out": np.zeros((4, D))} | change
    held = {n: a.copy() for n, a in given.items() if isinstance(a, np.ndarray)}
    with pytest.raises(error) as raised:
        LCE.value_and_grad(**given, wrt="x")
    assert "linear_cross_entropy" in str(raised.value)
    assert [p for p in pieces if p not in str(raised.value)] == []
    assert all(np.array_equal(given[n], a) for n, a in held.items()), "something was written"


def test_a_width_like_a_length_is_no_question() -> None:
    """There is no axis to give: target has x's leading dimensions, whatever else would fit."""
    arrays = made((2, D))
    near(LCE(**arrays), plain(arrays, 1.0, axis=-1)[0])
    with pytest.raises(ValueError, match=r"target: got shape \(2, 6\), expected \(2, 3\)(?!.*axis=1)"):
        LCE(np.ones((2, 3, 6)), arrays["linear_weight"], np.zeros((2, 6), int))


def test_lists_and_mixtures(load_library: Any, close: Callable[..., None]) -> None:
    arrays = made((4,))
    close(LCE(**{n: a.tolist() for n, a in arrays.items()}), LCE(**arrays))
    torch = load_library("torch")
    with pytest.raises(TypeError, match="linear_cross_entropy: arrays: got a mix of numpy and torch"):
        LCE(**(arrays | {"x": torch.array(arrays["x"])}))
    with pytest.raises(TypeError, match="linear_cross_entropy: target: got list, expected a torch array"):
        LCE(**{n: torch.array(a) if n != "target" else a.tolist() for n, a in arrays.items()})
    with pytest.raises(IndexError, match=r"target\[2\]: got 9, expected 0 <= target < 9"):
        LCE(**{n: torch.array(a) for n, a in (arrays | {"target": np.array([0, 1, 9, 8])}).items()})


# --- memory --------------------------------------------------------------------------------------------------------------


def peak(function: Callable[[], Any]) -> int:
    function()
    tracemalloc.start()
    try:
        kept = function()
        return tracemalloc.get_traced_memory()[1] if kept is not None else 0
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
@pytest.mark.parametrize("weighted", [False, True])
def test_memory(dtype: str, weighted: bool) -> None:
    """One chunk of logits, the results, and a block of the sums; for half precision, the sum in float32 besides."""
    rows, width, classes, size = 1024, 512, 6000, 64
    kind = HALVES.get(dtype, np.dtype(dtype))
    x, w = (RNG.standard_normal(s).astype(kind) for s in ((rows, width), (classes, width)))
    weight = np.ones(classes, kind) if weighted else None
    target, cotangent = RNG.integers(0, classes, rows), RNG.standard_normal(rows).astype("f4")
    chunk = 4 * size * classes
    block = 4 * 1024 * (width + (2 * 1024 if dtype in HALVES else 0))
    small = 200_000 + 3 * 4 * classes  # besides rows: results of one number a row or class
    with xpnn.use_backend("numba"):
        options = {"chunk_size": size, "weight": weight}
        assert peak(lambda: LCE(x, w, target, **options)) < chunk + (block if dtype in HALVES else 0) + small
        total = 4 * w.size + (w.nbytes if dtype in HALVES else 0)
        most = chunk + total + x.nbytes + block + small
        assert peak(lambda: LCE.value_and_grad(x, w, target, **options)) < most
        pullback = LCE.vjp(x, w, target, **options, reduction="none")[1]
        assert peak(lambda: pullback(cotangent)) < most
        assert most < 0.9 * (4 * rows * classes + 2 * w.nbytes)  # what all logits and a second sum would take
        if dtype == "float32":
            out = np.empty_like(x), np.empty_like(w)
            assert peak(lambda: LCE.value_and_grad(x, w, target, **options, out=out)) < chunk + block + small


# --- the kernel as an object ---------------------------------------------------------------------------------------------


def test_object() -> None:
    assert pickle.loads(pickle.dumps(LCE)) is LCE
    assert list(inspect.signature(LCE).parameters)[:3] == ["x", "linear_weight", "target"]
    assert "axis" not in inspect.signature(LCE).parameters
    assert "chunks of rows" in (LCE.__doc__ or "")
    arrays = made()
    assert LCE.explain(**arrays) == "numba"
    with xpnn.use_backend("numpy"):
        assert LCE.explain(**arrays) == "numpy"


def test_source_says_where_to_look() -> None:
    for backend in ("numba", "cupy"):
        with pytest.raises(xpnn.BackendError, match=r"by chunks of rows; see linear\.source and cross_entropy\.source"):
            LCE.source(backend=backend)
        shown = CliRunner().invoke(cli.main, ["show", "linear_cross_entropy", "--backend", backend])
        assert shown.exit_code == 1
        assert shown.output.startswith("Error: linear_cross_entropy.source: it has no code of its own")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("direction", ["forward", "value_and_grad", "backward"])
def test_warmup_compiles_what_runs(python: Callable[..., str], dtype: str, direction: str) -> None:
    """After it, no other module is loaded."""
    call = {"forward": "k(x, w, t)", "value_and_grad": "k.value_and_grad(x, w, t)", "backward": "k.backward(one, x, w, t)"}
    out = python(
        f"""
        import sys
        import numpy as np, xpnn
        k = xpnn.linear_cross_entropy
        modules = lambda: {{n for n in sys.modules if n.startswith("xpnn_cache_")}}
        k.warmup(dtype="{dtype}", direction="{direction}")
        before = modules()
        x, w, t, one = np.ones((4, 3), "{dtype}"), np.ones((5, 3), "{dtype}"), np.zeros(4, int), np.float32(1)
        {call[direction]}
        print(len(before) > 0, modules() - before)
        """
    )
    assert out.strip() == "True set()"
