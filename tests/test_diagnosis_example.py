"""The notes' warnings on handwritten digits: that the example shows what it says, and how large the effects are."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import xpnn
from xpnn.backends.kernel import registry

pytest.importorskip("sklearn", reason="sklearn is not installed: examples/diagnosis.py not run")
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example, its data, and the network of the other examples."""
    known = dict(registry)
    monkeypatch.syspath_prepend(EXAMPLES)
    digits, diagnosis, network = (importlib.import_module(n) for n in ("digits", "diagnosis", "network"))
    yield diagnosis, digits, network
    registry.clear()
    registry.update(known)


def test_it_looks_at_the_network_that_it_trains(modules: Any, backend: str) -> None:
    """The same loss and gradients as the examples' fused layers have; each z leads to the next."""
    diagnosis, digits, network = modules
    x, _, target, _ = digits.digits(0)
    x, target = x[:50].astype(np.float64), target[:50]
    params = network.xavier((64, 12, 11, 10), np.random.default_rng(0), "float64")
    loss, gradients, layers = diagnosis.look(params, x, target, xpnn.tanh)
    expected, wanted = network.loss_and_gradients(params, x, target, xpnn.tanh)
    assert loss == pytest.approx(float(expected), rel=1e-12)
    for got, want in zip(gradients, wanted, strict=True):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)
    assert [kernel for kernel, _, _ in layers] == [xpnn.tanh, xpnn.tanh, None]
    a = x
    for (_, z, dweight), (weight, bias), (dw, _) in zip(layers, params, gradients, strict=True):
        np.testing.assert_allclose(z, a @ weight.T + bias, rtol=1e-10, atol=1e-12)
        assert dweight is dw
        a = np.tanh(z)


def test_adagrad_is_pytorchs(modules: Any, backend: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: the example's Adagrad not compared")
    diagnosis, rng = modules[0], np.random.default_rng(1)
    w, h = rng.normal(size=(4, 5)), np.zeros((4, 5))
    theirs = torch.tensor(w.copy(), requires_grad=True)
    optimiser = torch.optim.Adagrad([theirs], lr=diagnosis.ADAGRAD_RATE)
    for _ in range(5):
        dw = rng.normal(size=w.shape)
        theirs.grad = torch.tensor(dw)
        optimiser.step()
        diagnosis.adagrad(w, h, dw)
    np.testing.assert_allclose(w, theirs.detach().numpy(), rtol=1e-12)


def test_gradients_vanish_behind_sigmoids_alone(modules: Any) -> None:
    diagnosis, digits, _ = modules
    found = diagnosis.vanishing(digits.digits(0))
    for when in (0, -1):
        first, last = ({n: seen[when][1].layers[k].gradient for n, seen in found.items()} for k in (0, -1))
        assert first["sigmoid"] / last["sigmoid"] < 1e-3 * first["relu"] / last["relu"]
        assert 0.1 < first["relu"] / last["relu"] < 100
        hidden = found["sigmoid"][when][1].layers[:-1]
        assert all(layer.ratio < 1 for layer in hidden)
        assert all(layer.saturated == layer.dead == 0 for layer in hidden)  # they vanish without any unit being saturated
    losses = {name: [loss for loss, _ in seen] for name, seen in found.items()}
    assert losses["sigmoid"][-1] > 2.2  # log 10 = 2.3: nothing learned
    assert losses["relu"][-1] < 1


def test_initialisation_and_rate_decide_who_dies(modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    diagnosis, digits, _ = modules
    monkeypatch.setattr(diagnosis, "RUNS", 2)
    found = diagnosis.dying(digits.digits(0))
    dead = {key: np.mean(runs.dead, axis=0) for key, runs in found.items()}
    accuracy = {key: np.mean(runs.accuracies) for key, runs in found.items()}
    for initial in ("unlucky", "Xavier"):
        assert dead[initial, "SGD"][0] == dead[initial, "Adagrad"][0]
        assert dead[initial, "SGD"][-1] > dead[initial, "Adagrad"][-1]
        assert accuracy[initial, "SGD"] < accuracy[initial, "Adagrad"]
    for optimiser in ("SGD", "Adagrad"):
        assert dead["unlucky", optimiser][0] > 5 * dead["Xavier", optimiser][0] > 0
        assert dead["unlucky", optimiser][-1] > dead["Xavier", optimiser][-1]
        assert accuracy["unlucky", optimiser] < accuracy["Xavier", optimiser]
    assert all(np.isfinite(loss) for runs in found.values() for loss in runs.losses)  # a NaN would not count as dead


@pytest.fixture
def short(modules: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same with few steps."""
    for name, value in {"RUNS": 1, "WIDE_STEPS": 20, "DEEP_STEPS": 5}.items():
        monkeypatch.setattr(modules[0], name, value)
    return modules


def test_a_seed_repeats(short: Any) -> None:
    diagnosis, digits, _ = short
    data = digits.digits(0)
    assert diagnosis.dying(data, 3) == diagnosis.dying(data, 3) != diagnosis.dying(data, 4)
    first, again = (diagnosis.vanishing(data, 3)["relu"][-1] for _ in range(2))
    assert first[0] == again[0]
    assert first[1].layers == again[1].layers


def test_command(short: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: no picture is drawn")
    _, digits, _ = short
    done = CliRunner().invoke(digits.main, ["--diagnose", "--pictures", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0
    for text in ("ten layers, at initialisation", "ten layers, after 5 steps", "loss: sigmoid 2.", "Adagrad, rate 0.01"):
        assert text in done.output
    assert "…" not in done.output  # every column has its room
    assert {p.name for p in tmp_path.iterdir()} == {"vanishing.png", "dead-units.png"}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in tmp_path.iterdir())


def test_pictures_show_what_was_found(short: Any) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: no picture is drawn")
    diagnosis, digits, _ = short
    data = digits.digits(0)
    found, runs = diagnosis.vanishing(data), diagnosis.dying(data)
    (axes,) = diagnosis.vanishing_picture(found).axes
    assert axes.get_yscale() == "log"
    drawn = [(line.get_label(), list(line.get_ydata())) for line in axes.lines]
    assert drawn == [
        (f"{name}, {when}", [layer.gradient for layer in report.layers])
        for name, seen in found.items()
        for (_, report), when in zip(seen, ("at initialisation", "after 5 steps"), strict=True)
    ]
    (axes,) = diagnosis.dying_picture(runs).axes
    assert [list(line.get_ydata()) for line in axes.lines[1::2]] == [r.dead[0] for r in runs.values()]
    assert list(axes.lines[0].get_xdata()) == [0, 10, 20]
