"""xpnn.jax: each kernel as a JAX function whose gradient is its own backward formula."""

from __future__ import annotations

import inspect
import pickle
import pydoc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import xpnn
from xpnn.backends.kernel import registry

RNG = np.random.default_rng(3)
X = RNG.normal(size=(4, 6))
TARGET = np.array([0, 5, -100, 3])


@pytest.fixture
def jax(load_library: Any) -> Any:
    """JAX with 64 bits, and `xpnn.jax` loaded."""
    load_library("jax")
    import jax

    import xpnn.jax

    assert xpnn.jax.wrap
    return jax


@pytest.fixture
def swish() -> Any:
    """A kernel of one's own, forgotten afterwards."""
    before = dict(registry)

    @xpnn.kernel
    def swish(xp: Any, x: Any, *, beta: float = 1.0) -> Any:
        return x / (1 + xp.exp(-beta * x))

    @swish.backward
    def swish_backward(xp: Any, dy: Any, x: Any, *, beta: float = 1.0) -> Any:
        s = 1 / (1 + xp.exp(-beta * x))
        return dy * (s + beta * x * s * (1 - s))

    yield swish
    registry.clear()
    registry.update(before)


def test_every_kernel(jax: Any, case: Any, close: Callable[..., None], numpy_reference: Callable[..., Any]) -> None:
    """Values, and gradients for random cotangents under jit, equal NumPy's in float64; constants have gradient zero."""
    arrays = case.arrays()
    want, pullback = numpy_reference(case.kernel.vjp, *case.given(arrays), **case.options)
    dy = case.cotangent(want)
    gradients = numpy_reference(pullback, dy)
    gradients = dict(zip(arrays, gradients if isinstance(gradients, tuple) else (gradients,), strict=True))
    integers = {n: a for n, a in arrays.items() if a.dtype.kind == "i"}
    floats = {n: a for n, a in arrays.items() if n not in integers}

    def function(floats: Any) -> Any:
        return getattr(xpnn.jax, case.name)(**floats, **integers, **case.options)

    @jax.jit
    def pulled(dy: Any, floats: Any) -> Any:
        y, pull = jax.vjp(function, floats)
        return y, pull(dy)[0]

    y, found = pulled(dy, floats)
    close(y, want)
    close(function(floats), want)
    assert found.keys() == floats.keys()
    for n, g in found.items():
        close(g, np.zeros(floats[n].shape) if gradients[n] is None else gradients[n])


def test_the_backward_formula_is_what_runs(jax: Any, swish: Any) -> None:
    """JAX's own derivative of a wrong formula would be right."""

    @swish.backward
    def wrong(xp: Any, dy: Any, x: Any) -> Any:
        return dy * (x * 0 + 7)

    assert float(jax.grad(xpnn.jax.wrap(swish))(2.0)) == 7.0
    assert float(jax.jit(jax.grad(xpnn.jax.wrap(swish)))(2.0)) == 7.0


def test_saved_values_are_used(jax: Any) -> None:
    """The gradient makes no second maximum: the forward's is kept."""
    jaxpr = str(jax.make_jaxpr(jax.value_and_grad(xpnn.jax.cross_entropy))(X, np.arange(4)))
    assert jaxpr.count("reduce_max") == 1


def test_vmap(jax: Any, close: Callable[..., None]) -> None:
    """Of values and gradients, over a further axis; of what has a gradient beside what is shared."""
    x, target = RNG.normal(size=(3, 4, 6)), RNG.integers(0, 6, (3, 4))
    loss = jax.vmap(jax.value_and_grad(xpnn.jax.cross_entropy))
    values, gradients = loss(x, target)
    for k in range(3):
        want = xpnn.cross_entropy.value_and_grad(x[k], target[k])
        close(values[k], want[0])
        close(gradients[k], want[1])
    weight = RNG.normal(size=(5, 6))
    shared = jax.vmap(jax.grad(lambda x, w: (xpnn.jax.linear(x, w, activation=xpnn.tanh) ** 2).sum(), 1), (0, None))
    y = xpnn.tanh(x[1] @ weight.T)
    close(shared(x, weight)[1], (2 * y * (1 - y**2)).T @ x[1])


def test_several_results(jax: Any, close: Callable[..., None]) -> None:
    """lse has a gradient, argmax is a whole number, accuracy has none."""

    def loss(x: Any) -> Any:
        value, lse, argmax, accuracy = xpnn.jax.cross_entropy(
            x, TARGET, return_lse=True, return_argmax=True, return_accuracy=True
        )
        return value + 0.3 * (lse**2).sum() + accuracy, (argmax, accuracy)

    (_, (argmax, accuracy)), g = jax.value_and_grad(loss, has_aux=True)(jax.numpy.asarray(X))
    (_, lse), pullback = xpnn.cross_entropy.vjp(X, TARGET, return_lse=True)
    close(g, pullback(1.0, 0.6 * lse)[0])
    np.testing.assert_array_equal(argmax, X.argmax(-1))
    close(accuracy, np.mean((X.argmax(-1) == TARGET)[TARGET != -100]))


def test_integers_have_float0(jax: Any) -> None:
    _, pull = jax.vjp(xpnn.jax.cross_entropy, jax.numpy.asarray(X), jax.numpy.asarray(TARGET))
    assert pull(1.0)[1].dtype == jax.dtypes.float0


def test_a_second_derivative(jax: Any, close: Callable[..., None]) -> None:
    """Reverse over reverse: the backward formula is differentiated by JAX."""
    v = RNG.normal(size=6)
    hessian_v = jax.grad(lambda x: (jax.grad(xpnn.jax.logsumexp)(x) * v).sum())(jax.numpy.asarray(X[0]))
    close(hessian_v, xpnn.softmax_jacobian(X[0]) @ v)
    close(jax.hessian(xpnn.jax.logsumexp)(jax.numpy.asarray(X[0])), xpnn.softmax_jacobian(X[0]))


def test_forwards(jax: Any, close: Callable[..., None]) -> None:
    """Not the functions of `xpnn.jax`; the kernels themselves, on JAX arrays."""
    x = jax.numpy.asarray(X[0])
    for forwards in (jax.jacfwd, lambda f: lambda x: jax.jvp(f, (x,), (x,))):
        with pytest.raises(TypeError, match="custom_vjp"):
            forwards(xpnn.jax.logsumexp)(x)
    close(jax.jacfwd(xpnn.logsumexp)(x), xpnn.softmax(X[0]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(jax: Any, dtype: str) -> None:
    """The loss is single, the gradient of the logits' dtype, as everywhere."""
    x = jax.numpy.asarray(X, dtype)
    loss, g = jax.jit(jax.value_and_grad(xpnn.jax.cross_entropy))(x, TARGET)
    assert loss.dtype == np.float32
    assert g.dtype == x.dtype
    want = xpnn.cross_entropy.value_and_grad(np.asarray(x, np.float64), TARGET)[1]
    np.testing.assert_allclose(np.asarray(g, np.float64), want, atol=2e-3)


def test_broadcast_axis_and_lists(jax: Any, close: Callable[..., None]) -> None:
    x, t = RNG.normal(size=(4, 1)), RNG.normal(size=6)
    pulled = jax.grad(xpnn.jax.mse_loss, (0, 1))(x, t)
    for g, want in zip(pulled, xpnn.mse_loss.value_and_grad(x, t, wrt=("x", "target"))[1], strict=True):
        close(g, want)
    dy = RNG.normal(size=X.shape)
    close(jax.vjp(lambda x: xpnn.jax.softmax(x, axis=0), X)[1](dy)[0], xpnn.softmax.vjp(X, axis=0)[1](dy))
    close(xpnn.jax.softmax([1.0, 1.0]), [0.5, 0.5])


@pytest.mark.parametrize("shape", [(), (0, 3), (3, 0), (1, 1)])
def test_few_elements(jax: Any, shape: tuple[int, ...]) -> None:
    for f in (xpnn.jax.softmax, xpnn.jax.sigmoid):
        assert jax.grad(lambda x, f=f: f(x).sum())(np.ones(shape)).shape == shape


def test_32_bits(python: Callable[..., str]) -> None:
    """As JAX comes: no warnings, and nothing wider than float32, of integers too."""
    pytest.importorskip("jax", reason="jax is not installed: not compared under its default of 32 bits")
    code = """
        import jax, jax.numpy as jnp, xpnn.jax
        x = jnp.arange(6).reshape(2, 3)
        loss, g = jax.jit(jax.value_and_grad(xpnn.jax.cross_entropy))(x * 1.0, x[:, 0] // 3)
        print(xpnn.jax.softmax(x).dtype, xpnn.softmax(x).dtype, loss.dtype, g.dtype)
    """
    assert python(code).split() == ["float32"] * 4


def test_your_own(jax: Any, swish: Any, close: Callable[..., None]) -> None:
    f = xpnn.jax.wrap(swish)
    assert f is xpnn.jax.wrap(swish)
    x, dy = X[0], RNG.normal(size=6)
    y, pull = jax.vjp(lambda x: f(x, beta=2.0), x)
    close(y, swish(x, beta=2.0))
    close(pull(dy)[0], swish.backward(dy, x, beta=2.0))


def test_bad_input(jax: Any, swish: Any) -> None:
    with pytest.raises(ValueError, match=r"cross_entropy: target: got shape \(3,\), expected \(4,\)"):
        xpnn.jax.cross_entropy(X, TARGET[:3])
    with pytest.raises(TypeError, match="out: got a jax array, expected None"):
        xpnn.jax.softmax(X, out=jax.numpy.asarray(X))
    with pytest.raises(AttributeError, match="no attribute 'softmin'"):
        _ = xpnn.jax.softmin

    @xpnn.kernel
    def bare(xp: Any, x: Any) -> Any:
        return x

    with pytest.raises(TypeError, match="bare: it has no backward"):
        xpnn.jax.wrap(bare)


@pytest.mark.parametrize(("call", "value", "message"), [
    (lambda x, v: xpnn.jax.huber_loss(x, x, delta=v), 1.0, "huber_loss: delta: got {}, expected a number"),
    (lambda x, v: xpnn.jax.rms_norm(x, eps=v), 1.0, "rms_norm: eps: got {}, expected something hashable, such as a number, {}"),
    (lambda x, v: xpnn.jax.cross_entropy(x, TARGET, ignore_index=v), 1, "ignore_index: got {}, expected an integer"),
    (lambda x, v: xpnn.jax.cross_entropy(x, TARGET, return_lse=v), True, "return_lse: got {}, expected True or False"),
    (lambda x, v: xpnn.jax.mse_loss(x, x, reduction=v), 1, "mse_loss: reduction: got {}, expected a string"),
    (lambda x, v: xpnn.jax.softmax(x, v), 1, "softmax: axis: got {}, expected an integer"),
    (lambda x, v: xpnn.jax.glu(x, v), 1, "glu: axis: got {}, expected an integer"),
    (lambda x, v: xpnn.jax.layer_norm(x, v), 6, "layer_norm: normalized_shape: got {}, expected an integer, or {}"),
    (lambda x, v: xpnn.jax.layer_norm(x, (4, v)), 6, "layer_norm: normalized_shape: got {}, expected an integer, or {}"),
    (lambda x, v: xpnn.adam(x, x, x, x, lr=v), 1.0, "adam: lr: got {}, expected a number"),
], ids=lambda v: v.partition(": got")[0] if isinstance(v, str) else "")  # fmt: skip
def test_traced_options(jax: Any, call: Callable[..., Any], value: Any, message: str) -> None:
    """The error says what to do; then it is done. A wrong value that is not traced is not told of JAX."""
    remedy = ", not traced: under jax.jit, name it in static_argnames"
    with pytest.raises(TypeError, match=message.format(*[".*"] * 2) + remedy):
        jax.jit(call)(X, value)
    if "reduction" not in message:  # a string, which JAX does not trace
        assert jax.jit(call, static_argnames="v")(X, value) is not None
    with pytest.raises(TypeError, match="expected") as raised:
        call(X, [[value]])
    assert "static_argnames" not in str(raised.value)


def test_looking(jax: Any) -> None:
    """Names, signatures, help and pickles."""
    kernels = {n: getattr(xpnn, n) for n in xpnn.kernels.__all__}
    names = {n for n, k in kernels.items() if n == "glu" or (isinstance(k, xpnn.Kernel) and k.declaration.backward)}
    assert names == set(xpnn.jax.__all__) - {"wrap"} <= set(dir(xpnn.jax))
    assert xpnn.jax.softmax_cross_entropy is xpnn.jax.cross_entropy
    for name in names:
        f, signature = getattr(xpnn.jax, name), inspect.signature(getattr(xpnn, name))
        assert [*inspect.signature(f).parameters] == [n for n in signature.parameters if n != "out"]
        assert pickle.loads(pickle.dumps(f)) is f
    text = pydoc.plain(pydoc.render_doc(xpnn.jax))
    assert "log_softmax(x, axis=-1)" in text
    assert "The logistic function" in text


def test_a_traced_target_has_no_values_to_check(jax: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """XPNN_CHECK=1 looks at arrays that have values, and leaves those under jit alone."""
    monkeypatch.setenv("XPNN_CHECK", "1")
    x, target = jax.numpy.zeros((2, 3)), jax.numpy.array([0, 7])
    with pytest.raises(IndexError, match=r"target\[1\]: got 7"):
        xpnn.jax.cross_entropy(x, target)
    assert np.isnan(jax.jit(xpnn.jax.cross_entropy)(x, target))
