"""What xpnn.torch refuses, beside what torch.nn.functional refuses."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", minversion="2.13", reason="torch 2.13 is not installed: xpnn.torch is not tested")
import torch.nn.functional as F  # noqa: E402, N812
from torch_helpers import classes, ours, random  # noqa: E402

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
