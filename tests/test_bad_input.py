"""Bad calls: an error of the right type that names the argument, what came and what was expected; nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import xpnn

RNG = np.random.default_rng(0)


def real(*shape: int, dtype: Any = np.float64) -> np.ndarray:
    return RNG.normal(size=shape).astype(dtype)


def classes(*values: int) -> np.ndarray:
    return np.array(values)


def frozen(a: np.ndarray) -> np.ndarray:
    a.flags.writeable = False
    return a


def pair(shape: tuple[int, int] = (4, 6)) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays of one shape whose memory overlaps in part."""
    memory = real(shape[0] + 1, shape[1])
    return memory[:-1], memory[1:]


def strided(a: np.ndarray, shape: tuple[int, ...], steps: tuple[int, ...]) -> np.ndarray:
    """A view of other shape; its steps are counted in elements."""
    return np.lib.stride_tricks.as_strided(a, shape, tuple(a.itemsize * step for step in steps))


@xpnn.kernel
def plain(xp, x):
    """No backward."""
    return x * x


def pulled(*dy: Any, kernel: Any = xpnn.softmax, **kwargs: Any) -> Any:
    return kernel.vjp(np.ones((2, 3)))[1](*dy, **kwargs)


ce, sm = xpnn.cross_entropy, xpnn.softmax
four = classes(0, 1, 2, 3)

# name: a function that makes the call through `call`, the error, and what the message must contain
BAD: dict[str, tuple[Callable[[Any], Any], type[Exception], tuple[str, ...]]] = {
    # what is no array of numbers
    "complex": (lambda call: call(sm, real(2, 3) + 1j), TypeError, ("softmax", "x", "complex128", "real")),
    "object": (lambda call: call(sm, np.array([1, None])), TypeError, ("softmax", "x", "object", "real")),
    "string": (lambda call: call(sm, np.array(["1", "2"])), TypeError, ("softmax", "x", "<U1", "real")),
    "dates": (lambda call: call(xpnn.relu, np.array(["2020"], "M8[Y]")), TypeError, ("relu", "x", "datetime64", "real")),
    "record": (lambda call: call(xpnn.relu, np.zeros(2, "f4,f4")), TypeError, ("relu", "x", "'f0'", "real")),
    "masked": (lambda call: call(sm, np.ma.array([1.0], mask=[1])), TypeError, ("softmax", "x", "MaskedArray", "mask")),
    "masked target": (
        lambda call: call(ce, real(4, 5), np.ma.array(four, mask=[1, 0, 0, 0])),
        TypeError, ("cross_entropy", "target", "MaskedArray", "mask"),
    ),
    "list of strings": (lambda call: call(sm, ["a", "b"]), TypeError, ("softmax", "x", "<U1", "real")),
    "ragged list": (lambda call: call(sm, [[1.0], [1.0, 2.0]]), TypeError, ("softmax", "x", "list", "numbers")),
    "a dict": (lambda call: call(sm, {"x": 1}), TypeError, ("softmax", "x", "dict", "array")),
    "a str": (lambda call: call(sm, "abc"), TypeError, ("softmax", "x", "str", "array")),
    "complex number": (lambda call: call(sm, 1j), TypeError, ("softmax", "x", "complex", "array")),
    # arguments
    "nothing": (lambda call: call(sm), TypeError, ("softmax", "missing", "x")),
    "None": (lambda call: call(sm, None), TypeError, ("softmax: x: got None, expected an array",)),
    "None by name": (lambda call: call(ce, real(4, 5), target=None), TypeError, ("cross_entropy: target: got None",)),
    "backward: None": (lambda call: call(sm.backward, None, real(2, 3)), TypeError, ("softmax.backward: dy: got None",)),
    "no target": (lambda call: call(ce, real(4, 5)), TypeError, ("cross_entropy", "missing", "target")),
    "no weight": (lambda call: call(xpnn.linear, real(4, 5)), TypeError, ("linear", "missing", "weight")),
    "too many": (lambda call: call(sm, real(2, 3), 1, 2), TypeError, ("softmax", "2 positional", "x, axis", "got 3")),
    "twice": (lambda call: call(sm, real(2, 3), x=real(2, 3)), TypeError, ("softmax", "x", "twice")),
    "dim": (lambda call: call(sm, real(2, 3), dim=1), TypeError, ("softmax", "'dim'", "axis")),
    "axis of none": (lambda call: call(xpnn.relu, real(2, 3), axis=1), TypeError, ("relu", "'axis'", "out")),
    "axis of linear": (lambda call: call(xpnn.linear, real(2, 3), real(4, 3), axis=0), TypeError, ("linear", "'axis'")),
    # axis
    "axis high": (lambda call: call(sm, real(2, 3), axis=2), ValueError, ("softmax", "axis", "2", "-2 <= axis < 2", "(2, 3)")),
    "axis low": (lambda call: call(sm, real(2, 3), axis=-3), ValueError, ("softmax", "axis", "-3", "-2 <= axis < 2")),
    "axis of 0-d": (lambda call: call(sm, np.array(1.0), axis=1), ValueError, ("softmax", "axis", "1", "0-d")),
    "axis float": (lambda call: call(sm, real(2, 3), axis=1.0), TypeError, ("softmax", "axis", "1.0", "integer")),
    "axis bool": (lambda call: call(sm, real(2, 3), axis=True), TypeError, ("softmax", "axis", "True", "integer")),
    "axis None": (lambda call: call(sm, real(2, 3), axis=None), TypeError, ("softmax", "axis", "None", "integer")),
    "axis tuple": (lambda call: call(sm, real(2, 3), axis=(0, 1)), TypeError, ("softmax", "axis", "(0, 1)", "integer")),
    "PyTorch layout": (
        lambda call: call(ce, real(2, 5, 3), np.zeros((2, 3), int)),
        ValueError, ("cross_entropy", "target", "(2, 3)", "(2, 5)", "PyTorch layout? pass axis=1"),
    ),
    "ambiguous axis": (
        lambda call: call(ce, real(2, 3, 3), np.zeros((2, 3), int)),
        ValueError, ("cross_entropy", "target", "(2, 3)", "(2, 3, 3)", "axis=-1 or axis=1"),
    ),
    "no columns": (lambda call: call(xpnn.logsumexp, real(3, 0)), ValueError, ("logsumexp", "x", "(3, 0)", "at least one")),
    "no classes": (lambda call: call(ce, real(3, 0), classes(0, 0, 0)), (ValueError, IndexError), ("cross_entropy", "0")),
    # targets
    "target long": (
        lambda call: call(ce, real(4, 5), classes(0, 1, 2)),
        ValueError, ("cross_entropy", "target", "(3,)", "(4,)"),
    ),
    "target 2-d": (lambda call: call(ce, real(4, 5), np.zeros((4, 5), int)), ValueError, ("target", "(4, 5)", "(4,)")),
    "target column": (lambda call: call(ce, real(4, 5), four[:, None]), ValueError, ("target", "(4, 1)", "(4,)")),
    "target float": (lambda call: call(ce, real(4, 5), four * 1.0), (TypeError, ValueError), ("target", "(4,)", "(4, 5)")),
    "target float, square": (
        lambda call: call(ce, real(4, 4), four * 1.0), (TypeError, ValueError), ("target", "(4,)", "(4, 4)"),
    ),
    "target bool": (
        lambda call: call(ce, real(4, 5), four > 1),
        (TypeError, ValueError), ("cross_entropy", "target", "bool", "integers"),
    ),
    "target high": (
        lambda call: call(ce, real(4, 5), classes(0, 5, 1, 7)), IndexError, ("target[1]", "got 5", "0 <= target < 5", "-100"),
    ),
    "target low": (lambda call: call(ce, real(4, 5), classes(0, 1, 2, -1)), IndexError, ("target[3]", "got -1", "< 5")),
    "target beside ignored": (
        lambda call: call(ce, real(4, 5), classes(7, 9, -100, 7), ignore_index=7), IndexError, ("target[1]", "got 9", "(7)"),
    ),
    "target in two dimensions": (
        lambda call: call(ce, real(2, 3, 5), np.array([[0, 1, 4], [0, 8, 9]])), IndexError, ("target[1, 1]", "got 8", "< 5"),
    ),
    "target, axis=1": (
        lambda call: call(ce, real(2, 5, 3), np.array([[0, 1, 4], [0, 1, 6]]), axis=1), IndexError, ("target[1, 2]", "got 6"),
    ),
    "target of one row": (lambda call: call(ce, real(5), np.array(6)), IndexError, ("target", "got 6", "0 <= target < 5")),
    "target, gradient": (
        lambda call: call(ce.value_and_grad, real(4, 5), classes(0, 1, 2, 5), out=real(4, 5)),
        IndexError, ("target[3]", "got 5"),
    ),
    "target, in place": (
        lambda call: (lambda x: call(ce.value_and_grad, x, classes(0, 1, 2, 5), out=x))(real(4, 5)),
        IndexError, ("target[3]", "got 5"),
    ),
    "target, vjp": (lambda call: call(ce.vjp, real(4, 5), classes(0, 1, 2, 5)), IndexError, ("target[3]", "got 5")),
    "target, unsigned": (
        lambda call: call(ce, real(2, 5), np.array([0, 250], np.uint8)), IndexError, ("target[1]", "got 250"),
    ),
    "target, past int64": (
        lambda call: call(ce, real(2, 5), np.array([0, 2**64 - 100], np.uint64)), IndexError, ("target[1]", str(2**64 - 100)),
    ),
    # options
    "reduction": (
        lambda call: call(ce, real(4, 5), four, reduction="avg"),
        ValueError, ("reduction", "'avg'", "'none'", "'mean'", "'sum'"),
    ),
    "reduction None": (lambda call: call(ce, real(4, 5), four, reduction=None), TypeError, ("reduction", "None", "string")),
    "smoothing str": (
        lambda call: call(ce, real(4, 5), four, label_smoothing="a"),
        TypeError, ("label_smoothing", "'a'", "number"),
    ),
    "smoothing bool": (
        lambda call: call(ce, real(4, 5), four, label_smoothing=True),
        TypeError, ("label_smoothing", "True", "number"),
    ),
    "smoothing high": (
        lambda call: call(ce, real(4, 5), four, label_smoothing=1.5),
        ValueError, ("label_smoothing", "1.5", "0", "1"),
    ),
    "ignore float": (lambda call: call(ce, real(4, 5), four, ignore_index=1.0), TypeError, ("ignore_index", "1.0", "integer")),
    "ignore probabilities": (
        lambda call: call(ce, real(4, 5), real(4, 5), ignore_index=1), ValueError, ("ignore_index", "1", "probability"),
    ),
    "activation function": (
        lambda call: call(xpnn.linear, real(2, 3), real(4, 3), activation=np.tanh),
        TypeError, ("linear", "activation", "tanh", "kernel"),
    ),
    "activation name": (
        lambda call: call(xpnn.linear, real(2, 3), real(4, 3), activation="relu"),
        TypeError, ("linear", "activation", "'relu'", "kernel"),
    ),
    "activation unhashable": (
        lambda call: call(xpnn.linear, real(2, 3), real(4, 3), activation=[]), TypeError, ("linear", "activation", "[]"),
    ),
    "activation of losses": (
        lambda call: call(xpnn.linear, real(2, 3), real(4, 3), activation=ce),
        TypeError, ("linear", "activation", "element-wise"),
    ),
    # shapes
    "probabilities unfit": (
        lambda call: call(xpnn.cross_entropy_probs, real(4, 5), real(4, 6)),
        ValueError, ("target", "(4, 6)", "(4, 5)"),
    ),
    "probability target unfit": (lambda call: call(ce, real(4, 5), real(4, 6)), ValueError, ("target", "(4, 6)", "(4, 5)")),
    "class weights short": (lambda call: call(ce, real(4, 5), four, weight=real(4)), ValueError, ("weight", "(4,)", "(5,)")),
    "class weights 2-d": (
        lambda call: call(ce, real(4, 5), four, weight=real(1, 5)),
        ValueError, ("weight", "(1, 5)", "one dimension"),
    ),
    "linear: weight 1-d": (
        lambda call: call(xpnn.linear, real(4, 5), real(5)),
        ValueError, ("weight", "(5,)", "two dimensions"),
    ),
    "linear: weight transposed": (
        lambda call: call(xpnn.linear, real(4, 5), real(5, 3)),
        ValueError, ("weight", "(5, 3)", "(5, 5)"),
    ),
    "linear: bias short": (
        lambda call: call(xpnn.linear, real(4, 5), real(3, 5), real(2)),
        ValueError, ("bias", "(2,)", "(3,)"),
    ),
    "linear: bias 2-d": (
        lambda call: call(xpnn.linear, real(4, 5), real(3, 5), real(1, 3)),
        ValueError, ("bias", "(1, 3)", "one dimension"),
    ),
    "linear: x 0-d": (lambda call: call(xpnn.linear, np.array(1.0), real(3, 5)), ValueError, ("linear", "()", "one dimension")),
    # out
    "out shape": (lambda call: call(sm, real(4, 6), out=real(4, 5)), ValueError, ("softmax", "out", "(4, 5)", "(4, 6)")),
    "out that broadcasts": (lambda call: call(sm, real(4, 6), out=real(1, 4, 6)), ValueError, ("out", "(1, 4, 6)", "(4, 6)")),
    "out dtype": (lambda call: call(sm, real(4, 6), out=real(4, 6, dtype="f4")), TypeError, ("out", "float32", "float64")),
    "out byte order": (lambda call: call(sm, real(4, 6), out=real(4, 6).astype(">f8")), TypeError, ("out", "float64")),
    "out read-only": (lambda call: call(sm, real(4, 6), out=frozen(real(4, 6))), ValueError, ("out", "read-only", "written")),
    "out overlaps": (lambda call: (lambda a, b: call(sm, a, out=b))(*pair()), ValueError, ("out", "overlaps", "x")),
    "out overlaps, element-wise": (
        lambda call: (lambda a, b: call(xpnn.relu, a, out=b))(*pair()),
        ValueError, ("out", "overlaps", "x"),
    ),
    "out transposed input": (lambda call: (lambda a: call(sm, a, out=a.T))(real(4, 4)), ValueError, ("out", "overlaps", "x")),
    "out reversed input": (lambda call: (lambda a: call(sm, a, out=a[::-1]))(real(4, 4)), ValueError, ("out", "overlaps", "x")),
    "out overlaps itself": (
        lambda call: call(sm, real(2, 3), out=strided(real(8), (2, 3), (1, 1))),
        ValueError, ("softmax", "out", "share memory"),
    ),
    "out overlaps itself, element-wise": (
        lambda call: call(xpnn.relu, real(2, 3), out=strided(real(8), (2, 3), (2, 1))),
        ValueError, ("relu", "out", "share memory"),
    ),
    "out overlaps itself, three axes": (
        lambda call: call(xpnn.relu, real(2, 2, 3), out=strided(real(12), (2, 2, 3), (5, 1, 2))),
        ValueError, ("relu", "out", "share memory"),
    ),
    "out of one number": (
        lambda call: call(xpnn.logsumexp, real(2, 3), out=strided(real(1), (2,), (0,))),
        ValueError, ("logsumexp", "out", "share memory"),
    ),
    "out a list": (lambda call: call(sm, real(2), out=[0.0, 0.0]), TypeError, ("softmax", "out", "list")),
    "out too many": (lambda call: call(sm, real(4, 6), out=(real(4, 6), real(4, 6))), TypeError, ("out", "2 arrays", "1")),
    "out too few": (
        lambda call: call(xpnn.cross_entropy_probs.value_and_grad, real(5), real(5), wrt=("probs", "target"), out=real(5)),
        TypeError, ("out", "1 array", "2", "dprobs", "dtarget"),
    ),
    "outs overlap": (
        lambda call: (lambda a, b: call(
            xpnn.cross_entropy_probs.backward, real(4), real(4, 6), real(4, 6), out=(a, b)))(*pair()),
        ValueError, ("out[dtarget]", "overlaps", "dprobs"),
    ),
    "outs the same": (
        lambda call: (lambda a: call(
            xpnn.cross_entropy_probs.backward, real(4), real(4, 6), real(4, 6), out=(a, a)))(real(4, 6)),
        ValueError, ("out[dtarget]", "overlaps", "dprobs"),
    ),
    "out of an integer input": (
        lambda call: call(ce.backward, real(), real(4, 5), four, out=(real(4, 5), real(4))),
        TypeError, ("out[dtarget]", "None"),
    ),
    # gradients
    "value_and_grad of rows": (
        lambda call: call(ce.value_and_grad, real(4, 5), four, reduction="none"),
        ValueError, ("value_and_grad", "one number", "'mean'"),
    ),
    "value_and_grad of an array": (
        lambda call: call(sm.value_and_grad, real(4, 5)),
        ValueError, ("softmax.value_and_grad", "one number"),
    ),
    "wrt unknown": (lambda call: call(ce.value_and_grad, real(4, 5), four, wrt="x"), ValueError, ("wrt", "'x'", "logits")),
    "wrt integers": (
        lambda call: call(ce.value_and_grad, real(4, 5), four, wrt="target"),
        ValueError, ("wrt", "'target'", "logits"),
    ),
    "wrt not passed": (
        lambda call: call(ce.value_and_grad, real(4, 5), four, wrt=("weight",)),
        ValueError, ("wrt", "'weight'", "logits"),
    ),
    "wrt without gradient": (
        lambda call: call(ce.value_and_grad, real(4, 5), four, weight=np.ones(5), wrt="weight"),
        ValueError, ("wrt", "weight", "logits"),
    ),
    "vjp without backward": (lambda call: call(plain.vjp, real(2, 3)), TypeError, ("plain", "no backward", "@plain.backward")),
    "backward without backward": (
        lambda call: call(plain.backward, real(2, 3)),
        TypeError, ("plain", "no backward", "@plain.backward"),
    ),
    "grad without backward": (
        lambda call: call(plain.value_and_grad, real(1)),
        TypeError, ("plain", "no backward", "@plain.backward"),
    ),
    "cotangent shape": (lambda call: call(pulled, real(3, 2)), ValueError, ("softmax", "dy", "(3, 2)", "(2, 3)")),
    "cotangent that broadcasts": (lambda call: call(pulled, real(3)), ValueError, ("softmax", "dy", "(3,)", "(2, 3)")),
    "cotangent complex": (lambda call: call(pulled, real(2, 3) * 1j), TypeError, ("softmax", "dy", "complex128", "real")),
    "cotangents": (lambda call: call(pulled, real(2, 3), real(2, 3)), TypeError, ("softmax", "1 cotangent", "got 2")),
    "no cotangent": (lambda call: call(pulled), TypeError, ("softmax", "1 cotangent", "got 0")),
    "backward: nothing cached": (lambda call: call(sm.backward, real(2, 3)), TypeError, ("softmax.backward", "missing y", "x")),
    "backward: no cotangent": (lambda call: call(sm.backward, y=real(2, 3)), TypeError, ("softmax.backward", "missing dy")),
    "backward: cache unfit": (
        lambda call: call(sm.backward, real(2, 3), y=real(2, 4)),
        ValueError, ("softmax.backward", "y", "(2, 4)", "(2, 3)"),
    ),
    "backward: unknown": (
        lambda call: call(sm.backward, real(2, 3), z=real(2, 3)),
        TypeError, ("softmax.backward", "'z'", "y"),
    ),
    # choosing
    "source of nothing": (
        lambda call: call(sm.source, backend="fortran"),
        (ValueError, xpnn.BackendError), ("softmax", "'fortran'", "numba"),
    ),
    "source direction": (
        lambda call: call(sm.source, direction="up"),
        ValueError, ("softmax", "direction", "'up'", "'forward'"),
    ),
    "source dtype": (
        lambda call: call(sm.source, dtype="int32"),
        (ValueError, TypeError, xpnn.BackendError), ("int32", "float32"),
    ),
    "warmup dtype": (lambda call: call(sm.warmup, dtype="longdouble"), xpnn.BackendError, ("numba", "float16", "float32")),
    "warmup option": (lambda call: call(ce.warmup, reducton="sum"), TypeError, ("cross_entropy", "'reducton'")),
    "set_backend": (lambda call: call(xpnn.set_backend, "cuda"), ValueError, ("backend", "'cuda'", "auto", "numba")),
    "set_backend None": (lambda call: call(xpnn.set_backend, None), ValueError, ("backend", "None", "auto", "numba")),
}  # fmt: skip


def arrays_in(values: Any) -> list[np.ndarray]:
    if isinstance(values, np.ndarray):
        return [values]
    return [a for v in values for a in arrays_in(v)] if isinstance(values, tuple | list) and values else []


@pytest.mark.parametrize("name", BAD)
def test_bad_call(backend: str, name: str) -> None:
    make, error, pieces = BAD[name]
    calls = []

    def call(function: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(name)
        held = arrays_in([*args, *kwargs.values()])
        before = [a.tobytes() for a in held]
        with pytest.raises(error) as raised:
            function(*args, **kwargs)
        message = str(raised.value)
        assert [p for p in pieces if p not in message] == [], message
        assert [a.tobytes() for a in held] == before, "something was written"

    make(call)
    assert calls == [name]


def test_out_in_another_order(backend: str) -> None:
    """Elements that lie apart in any order are no overlap."""
    x, memory = real(2, 3, 4), np.zeros((4, 8, 7))
    for out in (memory[1:3, 7:1:-2, ::2], memory[:, :3, 5::-3].T):
        assert out.shape == x.shape
        assert xpnn.relu(x, out=out) is out
        np.testing.assert_array_equal(out, np.maximum(x, 0))


def test_use_backend_unknown() -> None:
    with pytest.raises(ValueError, match="backend: got 'cuda', expected one of auto, "), xpnn.use_backend("cuda"):
        raise AssertionError("entered")


def test_longdouble_by_name() -> None:
    x = np.ones((2, 3), np.longdouble)
    with xpnn.use_backend("numba"), pytest.raises(xpnn.BackendError) as raised:
        xpnn.softmax(x)
    assert all(piece in str(raised.value) for piece in ("numba", "float16", "float32", "auto"))


def test_errors_repeat() -> None:
    """A call that works leaves a short way for the next; it must refuse the same things."""
    logits = real(4, 5)
    for _ in range(2):
        xpnn.cross_entropy.value_and_grad(logits, four)
        xpnn.softmax(logits)
    with pytest.raises(IndexError, match=r"target\[2\]: got 5"):
        xpnn.cross_entropy.value_and_grad(logits, classes(0, 1, 5, 3))
    with pytest.raises(ValueError, match=r"target: got shape"):
        xpnn.cross_entropy.value_and_grad(logits, classes(0, 1, 2))
    with pytest.raises(ValueError, match="read-only"):
        xpnn.softmax(logits, out=frozen(real(4, 5)))
    a, b = pair((4, 5))
    with pytest.raises(ValueError, match="overlaps x"):
        xpnn.softmax(a, out=b)
    with pytest.raises(TypeError, match="float32"):
        xpnn.softmax(logits, out=real(4, 5, dtype="f4"))
