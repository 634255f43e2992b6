"""cross_entropy with every option: against torch.nn.functional, and what that lacks against torch's automatic gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import xpnn
from xpnn.backends.declare import trace
from xpnn.backends.kinds import Full, Index
from xpnn.backends.program import walk

INF, NAN = np.inf, np.nan
RNG = np.random.default_rng(17)
ce = xpnn.cross_entropy
Arrays = dict[str, np.ndarray]
Options = dict[str, Any]

# what each choice may be; "target" to "divisor" say which arrays there are
CHOICES: dict[str, tuple[Any, ...]] = {
    "reduction": ("mean", "sum", "none"),
    "label_smoothing": (0.0, 0.1),
    "z_loss": (0.0, 0.01),
    "softcap": (None, 3.0),
    "return_lse": (False, True),
    "return_argmax": (False, True),
    "return_accuracy": (False, True),
    "target": ("classes", "probabilities"),
    "weight": (False, True),
    "row_scale": (False, True),
    "divisor": (False, True),
}
Case = tuple[Any, ...]
EVERY: list[Case] = list(itertools.product(*CHOICES.values()))


def pairwise(cases: Iterable[Case]) -> list[Case]:
    """A few of the cases, in which every two choices meet in every way."""
    pairs = {c: set(itertools.combinations(enumerate(c), 2)) for c in cases}
    missing, few = set().union(*pairs.values()), []
    while missing:
        few.append(max(pairs, key=lambda c: len(pairs[c] & missing)))
        missing -= pairs[few[-1]]
    return few


FEW = pairwise(EVERY)


def settle(case: Case) -> tuple[dict[str, Any], Options]:
    """A case's arrays, as wishes, and its options."""
    chosen = dict(zip(CHOICES, case, strict=True))
    return {n: chosen.pop(n) for n in ("target", "weight", "row_scale", "divisor")}, chosen


def draw(case: Case, rows: int, columns: int, rng: np.random.Generator, ignored: float = 0.3) -> tuple[Arrays, Options]:
    """Random arrays for a case; some rows of class numbers are ignored."""
    wishes, options = settle(case)
    arrays: Arrays = {"logits": 3 * rng.normal(size=(rows, columns))}
    if wishes["target"] == "classes":
        arrays["target"] = np.where(rng.random(rows) < ignored, -100, rng.integers(0, columns, rows))
    else:
        arrays["target"] = rng.uniform(0.1, 1, (rows, columns))
    if wishes["weight"]:
        arrays["weight"] = rng.uniform(0.2, 2, columns)
    if wishes["row_scale"]:
        arrays["row_scale"] = rng.normal(size=rows)
    if wishes["divisor"]:
        arrays["divisor"] = np.array(rng.uniform(1, 9))
    return arrays, options


# --- what torch says --------------------------------------------------------------------------------------------------


def by_definition(torch: Any, arrays: dict[str, Any], options: Options) -> dict[str, Any]:
    """loss and lse of torch tensors, from log_softmax; ignored rows' logits are not looked at."""
    logits, target = arrays["logits"], arrays["target"]
    rows, columns = logits.shape
    eps, cap = options["label_smoothing"], options["softcap"]
    weight = arrays.get("weight", torch.ones(columns, dtype=logits.dtype))
    classes = not target.is_floating_point()
    counts = target != -100 if classes else torch.ones(rows, dtype=torch.bool)
    x = torch.where(counts[:, None], logits, 0.0)
    x = x if cap is None else cap * torch.tanh(x / cap)
    log_p = torch.log_softmax(x, -1)
    if classes:
        own = torch.where(counts, target, 0)
        y = torch.nn.functional.one_hot(own, columns).to(x.dtype)
        mass = weight[own][counts].sum()
    else:
        y, mass = target, rows
    y = (1 - eps) * y + eps / columns
    loss = -(torch.where(y == 0, 0.0, weight * y * log_p)).sum(-1)
    lse = torch.logsumexp(x, -1)
    loss = arrays.get("row_scale", 1.0) * (loss + options["z_loss"] * lse**2)
    loss, lse = (torch.where(counts, v, 0.0) for v in (loss, lse))
    if options["reduction"] != "none":
        loss = loss.sum()
    if options["reduction"] == "mean":
        loss = loss / arrays.get("divisor", mass)
    return {"loss": loss, **({"lse": lse} if options["return_lse"] else {})}


def best_columns(x: np.ndarray) -> np.ndarray:
    """The column of each row's first NaN, else of its first largest number."""
    return np.array([np.flatnonzero(np.isnan(r) if np.isnan(r).any() else r == r.max())[0] for r in x])


def counted(arrays: Arrays, options: Options) -> dict[str, Any]:
    """argmax and accuracy."""
    best, target = best_columns(arrays["logits"]), arrays["target"]
    counts = np.full(len(best), True) if target.ndim == 2 else target != -100
    right = best == (target if target.ndim == 1 else best_columns(target))
    found = {"argmax": best, "accuracy": right[counts].mean() if counts.any() else NAN}
    return {n: v for n, v in found.items() if options[f"return_{n}"]}


def same(ours: Any, want: Any, size: float, what: str) -> None:
    """Equal to a few roundings of the largest value, or of `size`, of which the values are differences."""
    want = np.asarray(want)
    size = max(size, float(np.max(np.abs(want), initial=0.0, where=np.isfinite(want))))
    np.testing.assert_allclose(ours, want, rtol=1e-12, atol=2e-14 * size, err_msg=what)


def cotangents(values: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {n: rng.normal(size=np.shape(v)) for n, v in values.items() if n in ("loss", "lse")}


def named(values: Any, options: Options) -> dict[str, Any]:
    names = ["loss", *(n for n in ("lse", "argmax", "accuracy") if options[f"return_{n}"])]
    return dict(zip(names, values if len(names) > 1 else (values,), strict=True))


def check(torch: Any, arrays: Arrays, options: Options, rng: np.random.Generator) -> None:
    """Values and gradients by torch and by us; by us in all three ways, and over the logits."""
    smooth = [n for n in ("logits", "row_scale") if n in arrays] + (["target"] if arrays["target"].ndim == 2 else [])
    theirs = {n: torch.tensor(a, requires_grad=n in smooth) for n, a in arrays.items()}
    want = by_definition(torch, theirs, options)
    values, pullback = ce.vjp(**arrays, **options)
    found = named(values, options)
    finite = np.abs(arrays["logits"][np.isfinite(arrays["logits"])])
    size = float(finite.max(initial=1.0))  # of the largest term
    size = size + options["z_loss"] * size**2
    for n, v in counted(arrays, options).items():
        np.testing.assert_array_equal(found[n], v, n)
    for n, v in want.items():
        same(found[n], v.detach(), size * max(np.abs(arrays.get("row_scale", 1.0)).max(), 1.0), n)
    dy = cotangents(found, rng)
    torch.autograd.backward([want[n] for n in dy], [torch.tensor(d) for d in dy.values()])
    gradients = dict(zip(arrays, pullback(*dy.values()), strict=True))
    for n, gradient in gradients.items():
        if n in smooth:
            same(gradient, theirs[n].grad, size if n != "logits" else 1.0, "d" + n)
        else:
            assert gradient is None, n
    backward = {n: arrays.get(n) for n in ("logits", "target", "weight", "row_scale", "divisor")}
    again = ce.backward(**{"d" + n: d for n, d in dy.items()}, **arrays, **options)
    for ours, n in zip(again, (n for n in backward if n in arrays), strict=True):
        np.testing.assert_array_equal(ours, gradients[n], n)
    if options["reduction"] == "none":
        return
    alone = pullback(np.ones(()), *([None] * (len(dy) - 1)))
    value, grads = ce.value_and_grad(**arrays, **options, wrt=tuple(smooth))
    for ours, n in zip(named(value, options).values(), found, strict=True):
        np.testing.assert_array_equal(ours, found[n], n)
    for ours, n in zip(grads, smooth, strict=True):
        same(ours, dict(zip(arrays, alone, strict=True))[n], size, "d" + n)
    value, fresh = ce.value_and_grad(**arrays, **options)
    over = arrays["logits"].copy()
    again, written = ce.value_and_grad(**(arrays | {"logits": over}), **options, out=over)
    assert written is over
    np.testing.assert_array_equal(over, fresh)
    for a, b in zip(named(again, options).values(), named(value, options).values(), strict=True):
        np.testing.assert_array_equal(a, b)


# --- the grids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probabilities", [False, True], ids=["classes", "probabilities"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_of_torch(backend: str, load_library: Any, reduction: str, label_smoothing: float, probabilities: bool) -> None:
    """What torch has, along the axes and in the dimensions that it has."""
    torch = load_library("torch").xp
    for weighted, ignores, shape in itertools.product((False, True), (False, True), ((8, 5), (3, 5, 4), (3, 4, 5))):
        if ignores and probabilities:
            continue
        if backend == "numba" and shape == (3, 5, 4) and (reduction != "none" or label_smoothing):
            continue  # a form of its own for an axis that is not the last, compiled for seconds
        axis = 1 if shape[1] == 5 else -1
        logits = RNG.normal(size=shape)
        lead = logits.sum(axis).shape
        target = RNG.uniform(size=shape) if probabilities else RNG.integers(0, 5, lead)
        weight = RNG.uniform(0.2, 2, 5) if weighted else None
        options = {"reduction": reduction, "label_smoothing": label_smoothing}
        if ignores:
            target.flat[::3] = 1
            options["ignore_index"] = 1
        theirs = [torch.tensor(a, requires_grad=a.dtype.kind == "f") for a in (logits, target)]
        seen = [torch.movedim(t, axis, 1) if t.ndim == logits.ndim else t for t in theirs]
        w = None if weight is None else torch.tensor(weight)
        want = torch.nn.functional.cross_entropy(*seen, weight=w, **options)
        dloss = RNG.normal(size=tuple(want.shape))
        want.backward(torch.tensor(dloss))
        loss, pullback = ce.vjp(logits, target, weight=weight, axis=axis, **options)
        same(loss, want.detach(), 1.0, "loss")
        dlogits, dtarget, *none = pullback(dloss)
        same(dlogits, theirs[0].grad, 1.0, "dlogits")
        assert set(none) <= {None}
        if probabilities:
            same(dtarget, theirs[1].grad, 1.0, "dtarget")
        else:
            assert dtarget is None


@pytest.mark.parametrize("part", range(8))
def test_every_combination(load_library: Any, part: int) -> None:
    torch = load_library("torch").xp
    rng = np.random.default_rng(part)
    with xpnn.use_backend("numpy"):
        for case in EVERY[part::8]:
            check(torch, *draw(case, 5, 6, rng), rng)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_every_two_choices_fused(load_library: Any, case: Case) -> None:
    torch, rng = load_library("torch").xp, np.random.default_rng(3)
    with xpnn.use_backend("numba"):
        for rows, columns in ((1, 1), (5, 6), (3, 70)):
            check(torch, *draw(case, rows, columns, rng), rng)


# --- beyond them ------------------------------------------------------------------------------------------------------


def disturb(arrays: Arrays, rng: np.random.Generator, what: set[str]) -> None:
    """Make some logits extreme."""
    x, target = arrays["logits"], arrays["target"]
    if "far" in what:
        x += rng.choice([-1e4, 0.0, 1e4], (len(x), 1))
        x[rng.random(x.shape) < 0.1] *= -1
    if "ties" in what:
        x[:] = np.round(x / 3)
    if "masked" in what:  # not a whole row
        mask = rng.random(x.shape) < 0.4
        mask[np.arange(len(x)), rng.integers(0, x.shape[1], len(x))] = False
        x[mask] = -INF
    if target.ndim == 1:
        if "all ignored" in what:
            target[:] = -100
        if "NaN" in what:
            x[(target == -100)[:, None] & (rng.random(x.shape) < 0.5)] = NAN


@settings(deadline=None, max_examples=150)
@given(
    fused=st.booleans(),
    number=st.integers(0, len(EVERY) - 1),
    rows=st.integers(1, 6),
    columns=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    what=st.sets(st.sampled_from(["far", "ties", "masked", "all ignored", "NaN"])),
)
def test_any_rows(fused: bool, number: int, rows: int, columns: int, seed: int, what: set[str]) -> None:
    """The same on rows near ±1e4, with −inf masks, ties, and ignored rows full of NaN."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    case = FEW[number % len(FEW)] if fused else EVERY[number]
    arrays, options = draw(case, rows, columns, rng)
    disturb(arrays, rng, what)
    with xpnn.use_backend("numba" if fused else "numpy"), np.errstate(all="ignore"):
        check(torch, arrays, options, rng)


@pytest.mark.parametrize("case", [c for c in FEW if "classes" in c], ids=str)
def test_nothing_counts(backend: str, case: Case) -> None:
    """The mean of no rows is NaN, unless there is a divisor; everything else is exactly 0."""
    arrays, options = draw(case, 4, 5, np.random.default_rng(1), ignored=2.0)
    arrays["logits"][0] = NAN
    values, pullback = ce.vjp(**arrays, **options)
    found = named(values, options)
    nothing = options["reduction"] == "mean" and "divisor" not in arrays
    np.testing.assert_array_equal(found["loss"], np.full(np.shape(found["loss"]), NAN if nothing else 0.0))
    np.testing.assert_array_equal(found.get("lse", 0.0), np.zeros(4) if options["return_lse"] else 0.0)
    assert np.isnan(found.get("accuracy", NAN))
    for gradient in pullback(*cotangents(found, RNG).values()):
        if gradient is not None:
            np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


def test_softcap_at_the_edges(backend: str) -> None:
    """At ±inf the cap itself, with slope 0; small logits are themselves, to the last bits."""
    x = np.array([[INF, -INF, 0.0, -0.0, 1e4, 1e-300]])
    loss, pullback = ce.vjp(x, np.array([2]), softcap=2.0, reduction="none")
    capped = np.array([2.0, -2.0, 0.0, 0.0, 2.0, 0.0])
    want, through = ce.vjp(capped[None], np.array([2]), reduction="none")
    same(loss, want, 1.0, "loss")
    same(pullback(np.ones(1))[0], through(np.ones(1))[0] * [[0, 0, 1, 1, 0, 1]], 0.0, "dlogits")
    for c, dtype in itertools.product((0.5, 3.0), (np.float32, np.float64)):
        x = np.array([[1e-20, 1e-3, -0.1, 1.0, -4.0, 9.0]], dtype)
        lse = [ce(row.reshape(1, 1), np.array([0]), softcap=c, return_lse=True)[1][0] for row in x[0]]
        np.testing.assert_allclose(lse, c * np.tanh(x[0].astype(np.longdouble) / c), rtol=6 * float(np.finfo(dtype).eps))
    x = np.array([0.1, 5.0, 17.0, 300.0])
    slope = ce.vjp(x[:, None], np.zeros(4, int), softcap=1.0, return_lse=True)[1](None, np.ones(4))[0][:, 0]
    np.testing.assert_allclose(slope, 1 / np.cosh(x.astype(np.longdouble)) ** 2, rtol=1e-13)
    assert np.isnan(ce(np.array([[NAN, 1.0]]), np.array([1]), softcap=2.0))
    assert ce(x, np.array(0), softcap=INF) == ce(x, np.array(0))


# --- what is off ------------------------------------------------------------------------------------------------------


def text(directions: tuple[str, ...], target: Any, **options: Any) -> str:
    """The program of a call, as text."""
    d = ce.declaration
    kinds = {"logits": Full, "target": target}
    dtypes = {"logits": "float", "target": "int" if target is Index else "float"}
    return str(trace(d, kinds, dtypes, {**d.options, **options}, directions))  # type: ignore[arg-type]


OFF = {
    "label_smoothing": 0.0, "z_loss": 0.0, "softcap": None, "return_lse": False, "return_argmax": False,
    "return_accuracy": False,
}  # fmt: skip


@pytest.mark.parametrize("target", [Index, Full])
@pytest.mark.parametrize("names", [("loss",), ("loss", "dlogits")])
def test_what_is_off_costs_nothing(names: tuple[str, ...], target: Any) -> None:
    plain = text(names, target)
    assert text(names, target, **OFF) == plain
    for word in ("tanh", "expm1", "log1p", "argmax", "abs"):
        assert word not in plain
    d = ce.declaration
    program = trace(
        d, {"logits": Full, "target": target}, {"logits": "float", "target": "int" if target is Index else "float"},
        {**d.options}, names,
    )  # fmt: skip
    ops = [n.op for n in walk(program.outputs.values())]
    assert ops.count("row_max") == 1
    assert ops.count("row_sum") == (1 if target is Index else 1 + len(names))  # Σ exp; of probabilities Σ terms and Σ ŷ
    assert ops.count("exp") == 1
    for option, value in (("softcap", 2.0), ("z_loss", 0.1), ("label_smoothing", 0.1)):
        assert text(names, target, **{option: value}) != plain
    logits, classes = RNG.normal(size=(3, 4)), np.array([0, 1, 2])
    assert ce(logits, classes, **OFF, weight=None, row_scale=None, divisor=None) == ce(logits, classes)


# --- bad input --------------------------------------------------------------------------------------------------------

X, T = np.ones((2, 3)), np.array([0, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"softcap": c}, f"softcap: got {c!r}, expected a positive number or None") for c in (0, -1.0, NAN, True, "a")),
        ({"row_scale": np.ones(3)}, r"row_scale: got shape \(3,\), expected "),
        ({"row_scale": np.ones((2, 3))}, r"row_scale: got shape \(2, 3\), expected "),
        ({"divisor": np.ones(2)}, r"divisor: got shape \(2,\), expected "),
        ({"weight": np.ones(2)}, r"weight: got shape \(2,\), expected "),
        ({"label_smoothing": 1.5}, "label_smoothing: got 1.5, expected at most 1.0"),
        ({"reduction": "avg"}, "reduction: got 'avg', expected 'none', 'mean' or 'sum'"),
    ],
)
def test_bad_values(backend: str, options: Options, message: str) -> None:
    with pytest.raises(ValueError, match=f"^cross_entropy: {message}"):
        ce(X, T, **options)
    with pytest.raises(ValueError, match=f"^cross_entropy.value_and_grad: {message}|^cross_entropy: {message}"):
        ce.value_and_grad(X, T, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"z_loss": "a"}, "z_loss: got 'a', expected a number"),
        ({"z_loss": True}, "z_loss: got True, expected a number"),
        ({"return_lse": 1}, "return_lse: got 1, expected True or False"),
        ({"softcap": []}, r"softcap: got \[\], expected something hashable"),
    ],
)
def test_bad_types(options: Options, message: str) -> None:
    with pytest.raises(TypeError, match=f"^cross_entropy: {message}"):
        ce(X, T, **options)


def test_bad_cotangents(backend: str) -> None:
    with pytest.raises(TypeError, match=r"^cross_entropy.backward: dlse: got an array, expected None: there is no such output"):
        ce.backward(1.0, X, T, dlse=np.ones(2))
    takes = r"^cross_entropy pullback: takes {} cotangents \({}; None for zero\), got {}$"
    for options, names in (({}, ["dloss"]), ({"return_lse": True}, ["dloss", "dlse"])):
        values, pullback = ce.vjp(X, T, **options, return_argmax=True, return_accuracy=True)
        assert len(values) == len(names) + 2
        for count in {0, 1, 2, 3, 4} - {len(names)}:
            with pytest.raises(TypeError, match=takes.format(len(names), ", ".join(names), count)):
                pullback(*[1.0] * count)
    with pytest.raises(ValueError, match=r"^cross_entropy pullback: dlse: got shape \(3,\), expected \(2,\)"):
        pullback(1.0, np.ones(3))


def test_absent_cotangents(backend: str) -> None:
    """None is zero, and costs nothing; gradients add up."""
    arrays = {"logits": RNG.normal(size=(2, 3)), "target": RNG.uniform(size=(2, 3)), "row_scale": RNG.normal(size=2)}
    pullback = ce.vjp(**arrays, return_lse=True, softcap=2.0, z_loss=0.1)[1]
    dlse = RNG.normal(size=2)
    both, first, second = pullback(0.7, dlse), pullback(0.7, None), pullback(None, dlse)
    for ours, a, b in zip(both, first, second, strict=True):
        same(ours, a if b is None else a + b, 1.0, "a gradient")
    alone = ce.backward(None, arrays["logits"], arrays["target"], dlse=dlse, softcap=2.0, return_lse=True)
    np.testing.assert_array_equal(alone[0], second[0])
    with pytest.raises(TypeError, match=r"^cross_entropy pullback: dloss, dlse: got None, expected at least one array"):
        pullback(None, None)
    with pytest.raises(TypeError, match=r"^cross_entropy.backward: dloss: got None, expected an array$"):
        ce.backward(None, arrays["logits"], arrays["target"], return_lse=True)
