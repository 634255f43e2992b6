"""What xpnn.torch refuses, beside what torch.nn.functional refuses."""

from __future__ import annotations

import math

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
    "None": ("relu", (None,), {}),
    "a number of targets": ("linear_cross_entropy", (X, torch.randn(7, 5), T[:3]), {}),
    "weights in a list": ("nll_loss", (X, T, [1.0] * 5), {}),
    "logits without dimensions": ("cross_entropy", (torch.tensor(1.0), T[0]), {}),
    "log-probabilities without dimensions": ("nll_loss", (torch.tensor(1.0), T[0]), {}),
    "reduction of None": ("mse_loss", (X, X), {"reduction": None}),
    "reduction by a number": ("linear_cross_entropy", (X, torch.randn(7, 5), T), {"reduction": 1}),
    "huber's reduction": ("huber_loss", (X, X), {"reduction": None}),
    "integer target": ("kl_div", (X, T.expand(5, 4).T), {}),
    "integers for yes and no": ("binary_cross_entropy_with_logits", (X, T.expand(5, 4).T), {}),
    "truths for yes and no": ("binary_cross_entropy_with_logits", (X, X.detach() > 0), {}),
    "log_target": ("kl_div", (X, X.detach().exp()), {"log_target": 1}),
    "float ignore_index": ("cross_entropy", (X, T), {"ignore_index": 1.0}),
    "an option in a list": ("celu", (X,), {"alpha": [1.0]}),
    "dtype": ("softmax", (X, 1), {"dtype": "float32"}),
    "dim in a tensor": ("softmax", (torch.tensor(1.0), torch.tensor(1)), {}),
    "linear_weight's dtype": ("linear_cross_entropy", (X, torch.randn(7, 5).double(), T), {}),
    "linear_bias's dtype": ("linear_cross_entropy", (X, torch.randn(7, 5), T), {"linear_bias": torch.randn(7).half()}),
    "double weight of a norm": ("layer_norm", (X, (5,), torch.ones(5).double()), {}),
    "half weight of a norm": ("layer_norm", (X, (5,), torch.ones(5).half()), {}),
    "integer weight of a norm": ("layer_norm", (X, (5,), torch.ones(5).long()), {}),
    "weight and bias": ("layer_norm", (X, (5,), torch.ones(5), torch.ones(5).half()), {}),
    "half weight and single bias": ("layer_norm", (X.half(), (5,), torch.ones(5).half(), torch.ones(5)), {}),
    "weight of a norm in a list": ("rms_norm", (X, (5,), [1.0] * 5), {}),
    "normalized_shape of floats": ("rms_norm", (X, (5.0,)), {}),
    "normalized_shape's type": ("layer_norm", (X, "5"), {}),
    "eps": ("layer_norm", (X, (5,)), {"eps": "1"}),
    "no eps": ("layer_norm", (X, (5,)), {"eps": None}),
}
HERE = {  # what docs/torch.md says is refused by xpnn alone
    "integers": ("sigmoid", (T,), {}),
    "integer input": ("mse_loss", (T, T.float()), {}),
    "complex target": ("binary_cross_entropy_with_logits", (X.detach(), X.detach().to(torch.complex64)), {}),
    "complex numbers": ("tanh", (X.to(torch.complex64),), {}),
    "half precision of both kinds": ("mse_loss", (X.half(), X.bfloat16()), {}),
    "weights beside probabilities": ("cross_entropy", (X, torch.rand(4, 5), torch.rand(5).double()), {}),
    "weights that require grad": ("cross_entropy", (X, torch.rand(4, 5), torch.ones(5, requires_grad=True)), {}),
    "no classes": ("cross_entropy", (torch.zeros(4, 0), torch.full((4,), -100)), {}),
    "a tensor as a number": ("leaky_relu", (X, torch.tensor(1.0)), {}),
    "a truth as a number": ("cross_entropy", (X, T), {"label_smoothing": True}),
    "a bound that is NaN": ("hardtanh", (X,), {"max_val": math.nan}),
    "elementwise_mean": ("mse_loss", (X, X), {"reduction": "elementwise_mean"}),
    "inplace": ("relu", (X.detach(), True), {}),
    "weights of three dimensions": ("linear_cross_entropy", (X, torch.zeros(3, 2, 5), torch.zeros(4, 2).long()), {}),
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


@pytest.mark.usefixtures("composed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", HERE)
def test_refused_here_alone(case):
    name, args, kwargs = HERE[case]
    getattr(F, name)(*args, **kwargs)
    with pytest.raises(RuntimeError, match="expected"):
        getattr(ours, name)(*args, **kwargs)


@pytest.mark.usefixtures("composed")
@pytest.mark.filterwarnings("ignore")
def test_taken_here_alone():
    """The rest of docs/torch.md's list."""

    def yes_or_no(module):
        module.binary_cross_entropy_with_logits(X, torch.rand(4, 5), pos_weight=torch.ones(5) > 0)

    def huber(module):
        module.huber_loss(X, X.detach().double()).backward()

    def double_weights(module):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert module.nll_loss(X, T, torch.ones(5).double()).dtype is torch.float64

    def double_layer(module):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert module.linear_cross_entropy(X, torch.ones(7, 5).double(), T).dtype is torch.float64

    for call in (yes_or_no, huber, double_weights, double_layer):
        call(ours)
        with pytest.raises(RuntimeError):
            call(F)


@pytest.mark.usefixtures("composed")
def test_equal_options_are_not_the_same():
    """An option of the wrong type is refused after an equal one of the right type, and leaves that alone."""
    for _ in range(2):
        with pytest.raises(TypeError, match=r"ignore_index: got 1\.0, expected an integer"):
            ours.cross_entropy(X, T, ignore_index=1.0)
        ours.cross_entropy(X, T, ignore_index=1)


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
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian):  # of operators of torch.library, which have none
        with pytest.raises(RuntimeError, match=r"functorch transforms .* must override the setup_context staticmethod"):
            transform(lambda x: ours.cross_entropy(x, T))(X.detach())
    with pytest.raises(RuntimeError, match="tangent"):
        torch.func.jvp(lambda x: ours.softmax(x, 1), (X.detach(),), (X.detach(),))


def test_without_torch(python):
    said = python("import sys; sys.modules['torch'] = None\nimport xpnn.torch", fails=True)
    assert "xpnn.torch needs PyTorch" in said
