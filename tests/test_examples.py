"""The examples: a network's gradients by central differences, and training on handwritten digits."""

import importlib
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import xpnn

EXAMPLES = Path(__file__).parent.parent / "examples"
ACTIVATIONS = [xpnn.sigmoid, xpnn.tanh, xpnn.relu]


@pytest.fixture
def example(monkeypatch):
    """Import an example by name, as if it were run."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def load(name):
        for module in {"digits": ["sklearn"], "jax_step": ["sklearn", "jax"], "dask_rows": ["dask.array", "distributed"]}.get(
            name, []
        ):
            pytest.importorskip(module, reason=f"{module} is not installed: examples/{name}.py not run")
        return importlib.import_module(name)

    return load


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda k: k.__name__)
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_network_gradients(example, backend, activation):
    """Every slope of a network of three layers, derived and measured."""
    network = example("network")
    rng = np.random.default_rng(1)
    params = network.xavier((4, 6, 5, 3), rng, "float64")
    params = [(w, b + 0.1 * rng.standard_normal(b.shape)) for w, b in params]
    x, target = rng.standard_normal((7, 4)), rng.integers(0, 3, 7)
    step = 1e-5
    with xpnn.use_backend(backend):
        _, gradients = network.loss_and_gradients(params, x, target, activation)
        for layer, derived in zip(params, gradients, strict=True):
            for p, dp in zip(layer, derived, strict=True):
                assert dp.shape == p.shape
                assert np.max(np.abs(dp)) > 1e-3
                measured = np.empty_like(p)
                for at in np.ndindex(p.shape):
                    ends = []
                    for sign in (1, -1):
                        kept = p[at]
                        p[at] = kept + sign * step
                        logits, _ = network.forward(params, x, activation)
                        ends.append(xpnn.cross_entropy(logits, target))
                        p[at] = kept
                    measured[at] = (ends[0] - ends[1]) / (2 * step)
                np.testing.assert_allclose(dp, measured, rtol=1e-6, atol=1e-8)


def test_network_is_the_notes_page(example):
    """The same pass written out with the notes' formulas in plain NumPy."""
    network = example("network")
    rng = np.random.default_rng(2)
    (w1, b1), (w2, b2) = params = network.xavier((5, 4, 3), rng, "float64")
    x, target = rng.standard_normal((6, 5)), rng.integers(0, 3, 6)
    loss, ((dw1, db1), (dw2, db2)) = network.loss_and_gradients(params, x, target, xpnn.tanh)

    a1 = np.tanh(x @ w1.T + b1)
    z2 = a1 @ w2.T + b2
    y = np.exp(z2) / np.exp(z2).sum(axis=1, keepdims=True)
    truth = np.eye(3)[target]
    dz2 = (y - truth) / 6
    dz1 = (dz2 @ w2) * (1 - a1**2)
    assert loss == pytest.approx(-np.mean(np.sum(truth * np.log(y), axis=1)))
    for got, want in ((dw2, dz2.T @ a1), (db2, dz2.sum(0)), (dw1, dz1.T @ x), (db1, dz1.sum(0))):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)


def test_xavier(example):
    (w, b), _ = example("network").xavier((300, 200, 10), np.random.default_rng(0))
    assert w.shape == (200, 300)
    assert w.dtype == b.dtype == np.float32
    assert not b.any()
    assert np.var(w) == pytest.approx(2 / 500, rel=0.02)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda k: k.__name__)
def test_digits_backends_agree(example, activation):
    """The loss of every step of the first epoch: composed and fused, to float32 rounding."""
    train = example("digits").train
    composed, _ = train(activation, epochs=1, seed=3, backend="numpy")
    fused, _ = train(activation, epochs=1, seed=3, backend="numba")
    assert len(composed) == 42
    np.testing.assert_allclose(fused, composed, rtol=2e-6, atol=0)


@pytest.mark.parametrize(("activation", "epochs"), [(xpnn.tanh, 30), (xpnn.relu, 15)], ids=["tanh", "relu"])
def test_digits_accuracy(example, activation, epochs):
    losses, accuracy = example("digits").train(activation, epochs=epochs)
    assert np.mean(losses[-42:]) < np.mean(losses[:42])
    assert accuracy >= 0.97


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam", "adamw"])
def test_digits_optimizers(example, optimizer):
    """Five epochs of each, composed and fused; whichever learns."""
    train = example("digits").train
    losses, accuracy = train(optimizer=optimizer, epochs=5)
    assert accuracy >= 0.95
    composed, _ = train(optimizer=optimizer, epochs=1, backend="numpy")
    fused, _ = train(optimizer=optimizer, epochs=1, backend="numba")
    np.testing.assert_allclose(fused, composed, rtol=1e-4, atol=0)
    assert losses[0] == pytest.approx(fused[0], rel=1e-6)


def test_digits_command(example):
    from click.testing import CliRunner

    result = CliRunner().invoke(example("digits").main, ["--activation", "sigmoid", "--optimizer", "adamw", "--epochs", "1"])
    assert result.exit_code == 0, result.output
    assert "test accuracy" in result.output


def test_large_vocab(example, monkeypatch):
    """All logits or some at a time: the same losses, which fall; and the words are NumPy's."""
    large = example("large_vocab")
    text, known = large.words()
    assert known == large.VOCABULARY >= 30_000
    assert len(text) > 1_000_000
    monkeypatch.setattr(large, "BATCH", 64)
    monkeypatch.setattr(large, "VOCABULARY", 400)
    few = np.minimum(text[:50_000], 399)
    (a, most, _), (b, least, _) = (large.train(few, 12, loss_of, 1) for loss_of in large.LOSSES.values())
    np.testing.assert_allclose(a, b, rtol=1e-5)
    assert np.mean(a[-3:]) < 0.9 * a[0]
    assert 0 < least <= most + 10_000


def test_jax_step(example):
    """Jitted steps lose what the same steps on NumPy arrays do, and learn."""
    jax_step, network = example("jax_step"), example("network")
    rng = np.random.default_rng(4)
    ours = theirs = network.xavier((8, 6, 3), rng)
    for _ in range(3):
        x, target = rng.standard_normal((5, 8), "float32"), rng.integers(0, 3, 5)
        theirs, loss = jax_step.step(theirs, x, target)
        logits, caches = network.forward(ours, x, xpnn.tanh)
        expected, dlogits = xpnn.cross_entropy.value_and_grad(logits, target, label_smoothing=0.1)
        gradients = network.backward(dlogits, caches)
        ours = [
            tuple(p - jax_step.RATE * dp for p, dp in zip(*layers, strict=True)) for layers in zip(ours, gradients, strict=True)
        ]
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for p, q in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(p[0], q[0], rtol=1e-4, atol=1e-6)
    losses, accuracy = jax_step.train(150)
    assert losses[-20:].mean() < 0.5 * losses[0]
    assert accuracy > 0.9


def test_dask_rows(example):
    """The steps are those of NumPy on all rows, and hold a part of them at a time."""
    dask_rows = example("dask_rows")
    import dask

    rows, block = 40_000, 2_000
    with dask.config.set(scheduler="synchronous"):
        dask_rows.train(*dask_rows.data(100, 50), 1)  # compiles
        x, target = dask_rows.data(rows, block)
        tracemalloc.start()
        losses, weight = dask_rows.train(x, target, 2)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        x, target = dask.compute(x, target)
    assert peak < 0.5 * x.nbytes
    expected = np.zeros_like(weight)
    for loss in losses:
        want, dweight = xpnn.linear_cross_entropy.value_and_grad(x, expected, target, wrt="linear_weight")
        assert loss == pytest.approx(want, rel=1e-5)
        expected -= dask_rows.RATE * dweight
    np.testing.assert_allclose(weight, expected, atol=1e-5)


def test_dask_rows_command(example):
    """On a worker process of its own."""
    from click.testing import CliRunner

    result = CliRunner().invoke(
        example("dask_rows").main, ["--rows", "20000", "--steps", "1", "--workers", "1"], catch_exceptions=False
    )
    assert "step 0  loss 4.6052" in result.output
    assert "at most" in result.output


def test_torch_lm(example, monkeypatch):
    """PyTorch's losses or ours, of all logits or of some at a time: the same, and they fall."""
    pytest.importorskip("torch", reason="torch is not installed: the language model is not trained")
    lm = example("torch_lm")
    monkeypatch.setattr(lm, "BATCH", 4)
    text = np.random.default_rng(0).integers(0, 7, 5000)
    runs = {way: lm.train(way, text, 12, vocabulary=300) for way in lm.WAYS}
    for way, run in runs.items():
        np.testing.assert_allclose(run["losses"], runs["torch"]["losses"], rtol=1e-5, err_msg=way)
        assert run["losses"][-1] < 0.9 * run["losses"][0]
        assert run["seconds"]["step"] > run["seconds"]["head"] > run["seconds"].get("loss", 0)
