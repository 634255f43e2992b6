"""Optimisers' steps: one parameter array and its gradient in, the parameter after the step out, with what is kept for the next.

Each step is one pass over its arrays, and in place with `out=`. Names, defaults, semantics and the order in which things are
done are those of `torch.optim` in PyTorch 2.13.
"""

from math import inf, isfinite
from typing import Any

from xpnn.backends.kernel import kernel


def check_numbers(name, shapes, options):
    """Arrays are of one shape, numbers finite and not negative, decay rates of averages below one; steps count from one."""
    for n, shape in shapes.items():
        if shape != shapes["param"]:
            raise ValueError(f"{name}: {n}: got shape {shape}, expected param's {shapes['param']}")
    for n in ("lr", "lr_decay", "momentum", "weight_decay", "eps"):
        if n in options and not 0 <= options[n] < inf:
            raise ValueError(f"{name}: {n}: got {options[n]}, expected 0 <= {n} < inf")
    for n in ("beta1", "beta2"):
        if n in options and not 0 <= options[n] < 1:
            raise ValueError(f"{name}: {n}: got {options[n]}, expected 0 <= {n} < 1")
    if options.get("step", 1) < 1:
        raise ValueError(f"{name}: step: got {options['step']}, expected step >= 1, the number of this step")


def check_sgd(kinds, shapes, options):
    """PyTorch's rules for gradient descent."""
    check_numbers("sgd", shapes, options)
    momentum, dampening = options["momentum"], options["dampening"]
    if not isfinite(dampening):
        raise ValueError(f"sgd: dampening: got {dampening}, expected a finite number")
    if options["nesterov"] and (momentum == 0 or dampening != 0):
        raise ValueError(
            f"sgd: nesterov: got True with momentum={momentum} and dampening={dampening}, expected a momentum and no dampening"
        )


@kernel(
    outputs=("new_param", "new_momentum_buffer"),
    check=check_sgd,
    off={"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0},
    wide=("momentum_buffer", "new_momentum_buffer"),
    variants=(
        {"lr": 0.1, "weight_decay": 0.02, "maximize": True},
        {"momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.02},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02, "nesterov": True, "maximize": True},
    ),
)
def sgd(
    xp,
    param,
    grad,
    momentum_buffer=None,
    *,
    lr=1e-3,
    momentum=0.0,
    dampening=0.0,
    weight_decay=0.0,
    nesterov=False,
    maximize=False,
):
    """One step of gradient descent, with momentum or without.

    With g the gradient, γ the learning rate, λ the weight decay, μ the momentum, τ the dampening: g ← g + λ θ, then
    b ← μ b + (1 − τ) g, which is g in the first step, and θ ← θ − γ b. Nesterov's looks ahead: θ ← θ − γ (g + μ b).

    Parameters
    ----------
    param
        θ, of any shape.
    grad
        g, of the same shape.
    momentum_buffer
        b, as the step before returned it; None in the first. Read only where there is momentum.
    lr
        γ, at least 0.
    maximize
        Go up instead: g is replaced by −g.

    Returns
    -------
    new_param
        Of the shape of `param`, and of the dtype that it and `grad` promote to, whatever the states are of. A float16 parameter
        and a float32 gradient give float32, and `out=param` is refused then.
    new_momentum_buffer
        With momentum only. Of the dtype of `new_param`; float32 where that is of half precision.

    Raises
    ------
    ValueError
        For an array of another shape, a number that is negative, infinite or NaN (`dampening` may be negative), or Nesterov's
        momentum with dampening or without momentum.

    Notes
    -----
    Semantics are those of `torch.optim.SGD`, for one array. With `out=(param, momentum_buffer)` the step is made in place.

    Examples
    --------
    >>> import numpy as np, xpnn
    >>> param, grad = np.array([1.0, 2.0]), np.array([0.5, -0.5])
    >>> xpnn.sgd(param, grad, lr=0.1)
    array([0.95, 2.05])
    >>> new, buffer = xpnn.sgd(param, grad, lr=0.1, momentum=0.9)
    >>> new, buffer = xpnn.sgd(new, grad, buffer, lr=0.1, momentum=0.9, out=(new, buffer))
    >>> new
    array([0.855, 2.145])
    """
    g = -grad if maximize else grad
    if weight_decay:
        g = g + weight_decay * param
    if not momentum:
        return param - lr * g, None
    buffer = g if momentum_buffer is None else momentum * momentum_buffer + (1 - dampening) * g
    return param - lr * (g + momentum * buffer if nesterov else buffer), buffer


@kernel(
    outputs=("new_param", "new_state_sum"),
    check=lambda kinds, shapes, options: check_numbers("adagrad", shapes, options),
    off={"lr_decay": 0.0, "weight_decay": 0.0},
    wide=("state_sum", "new_state_sum"),
    domain={"state_sum": "positive"},
    variants=({"eps": 0.1}, {"step": 7, "lr": 0.1, "lr_decay": 0.01, "weight_decay": 0.02, "eps": 0.1, "maximize": True}),
)
def adagrad(xp, param, grad, state_sum, *, step=1, lr=1e-2, lr_decay=0.0, weight_decay=0.0, eps=1e-10, maximize=False):
    """One step of Adagrad, whose learning rate falls where gradients were large.

    With g the gradient, γ the learning rate, λ the weight decay, η its own decay: g ← g + λ θ, s ← s + g², and
    θ ← θ − γ / (1 + (t − 1) η) · g / (√s + ε).

    Parameters
    ----------
    param
        θ, of any shape.
    grad
        g, of the same shape.
    state_sum
        s, as the step before returned it; zeros, or something positive, in the first.
    step
        t, the number of this step, from 1.
    maximize
        Go up instead: g is replaced by −g.

    Returns
    -------
    new_param
        Of the shape of `param`, and of the dtype that it and `grad` promote to, whatever the states are of. A float16 parameter
        and a float32 gradient give float32, and `out=param` is refused then.
    new_state_sum
        Of the dtype of `new_param`; float32 where that is of half precision.

    Raises
    ------
    ValueError
        For an array of another shape, or a number that is negative, infinite or NaN.

    Notes
    -----
    Semantics are those of `torch.optim.Adagrad`, for one array. With `out=(param, state_sum)` the step is made in place.

    Examples
    --------
    >>> import numpy as np, xpnn
    >>> param, grad = np.array([1.0, 2.0]), np.array([0.5, -50.0])
    >>> new, state_sum = xpnn.adagrad(param, grad, np.zeros(2))
    >>> new
    array([0.99, 2.01])
    """
    g = -grad if maximize else grad
    if weight_decay:
        g = g + weight_decay * param
    total = state_sum + g * g
    rate = lr / (1 + (step - 1) * lr_decay) if lr_decay else lr
    return param - rate * (g / (xp.sqrt(total) + eps)), total


_ADAM: dict[str, Any] = {
    "outputs": ("new_param", "new_exp_avg", "new_exp_avg_sq", "new_max_exp_avg_sq"),
    "off": {"weight_decay": 0.0},
    "wide": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "new_exp_avg", "new_exp_avg_sq", "new_max_exp_avg_sq"),
    "domain": {"exp_avg_sq": "positive", "max_exp_avg_sq": "positive"},
}


@kernel(
    **_ADAM,
    check=lambda kinds, shapes, options: check_numbers("adam", shapes, options),
    variants=(
        {"lr": 0.3, "eps": 0.1},
        {"step": 7, "lr": 0.1, "beta1": 0.8, "beta2": 0.99, "weight_decay": 0.02, "eps": 0.1, "maximize": True},
    ),
)
def adam(
    xp,
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq=None,
    *,
    step=1,
    lr=1e-3,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    maximize=False,
):
    """One step of Adam.

    With g the gradient, γ the learning rate, λ the weight decay: g ← g + λ θ, then m ← β₁ m + (1 − β₁) g and
    v ← β₂ v + (1 − β₂) g². Averages that start from zero are too small by 1 − βᵗ after t steps, so
    θ ← θ − γ m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + ε).

    Parameters
    ----------
    param
        θ, of any shape.
    grad
        g, of the same shape.
    exp_avg
        m, as the step before returned it; zeros in the first.
    exp_avg_sq
        v, likewise.
    max_exp_avg_sq
        For AMSGrad: the largest v so far, which takes v's place below the root; zeros in the first step. None for Adam.
    step
        t, the number of this step, from 1.
    lr, beta1, beta2, eps
        γ, β₁, β₂ and ε.
    maximize
        Go up instead: g is replaced by −g.

    Returns
    -------
    new_param
        Of the shape of `param`, and of the dtype that it and `grad` promote to, whatever the states are of. A float16 parameter
        and a float32 gradient give float32, and `out=param` is refused then.
    new_exp_avg, new_exp_avg_sq
        Of the dtype of `new_param`; float32 where that is of half precision, in which an average could not move.
    new_max_exp_avg_sq
        With `max_exp_avg_sq` only, likewise.

    Raises
    ------
    ValueError
        For an array of another shape, a number that is negative, infinite or NaN, or a β that is not below 1.

    Notes
    -----
    Semantics are those of `torch.optim.Adam`, for one array; `betas=(beta1, beta2)`, and `amsgrad=True` is an array passed as
    `max_exp_avg_sq`. With `out=(param, exp_avg, exp_avg_sq)` the step is made in place.

    Examples
    --------
    >>> import numpy as np, xpnn
    >>> param, grad, zeros = np.array([1.0, 2.0]), np.array([0.5, -50.0]), np.zeros(2)
    >>> new, exp_avg, exp_avg_sq = xpnn.adam(param, grad, zeros, zeros, lr=0.1)
    >>> new
    array([0.9, 2.1])
    >>> new, exp_avg, exp_avg_sq = xpnn.adam(new, grad, exp_avg, exp_avg_sq, step=2, lr=0.1)
    """
    g = -grad if maximize else grad
    if weight_decay:
        g = g + weight_decay * param
    return moved(xp, param, g, exp_avg, exp_avg_sq, max_exp_avg_sq, step, lr, beta1, beta2, eps)


@kernel(
    **_ADAM,
    check=lambda kinds, shapes, options: check_numbers("adamw", shapes, options),
    variants=(
        {"lr": 0.3, "eps": 0.1},
        {"step": 7, "lr": 0.1, "beta1": 0.8, "beta2": 0.99, "weight_decay": 0.0, "eps": 0.1, "maximize": True},
    ),
)
def adamw(
    xp,
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq=None,
    *,
    step=1,
    lr=1e-3,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    weight_decay=1e-2,
    maximize=False,
):
    """One step of Adam with decoupled weight decay: θ ← θ − γ λ θ, then `adam` without decay.

    Parameters
    ----------
    param
        θ, of any shape.
    grad
        g, of the same shape.
    exp_avg
        m, as the step before returned it; zeros in the first.
    exp_avg_sq
        v, likewise.
    max_exp_avg_sq
        For AMSGrad: the largest v so far, which takes v's place below the root; zeros in the first step. None for Adam.
    step
        t, the number of this step, from 1.
    lr, beta1, beta2, eps, weight_decay
        γ, β₁, β₂, ε and λ.
    maximize
        Go up instead: g is replaced by −g.

    Returns
    -------
    new_param
        Of the shape of `param`, and of the dtype that it and `grad` promote to, whatever the states are of. A float16 parameter
        and a float32 gradient give float32, and `out=param` is refused then.
    new_exp_avg, new_exp_avg_sq
        Of the dtype of `new_param`; float32 where that is of half precision, in which an average could not move.
    new_max_exp_avg_sq
        With `max_exp_avg_sq` only, likewise.

    Raises
    ------
    ValueError
        For an array of another shape, a number that is negative, infinite or NaN, or a β that is not below 1.

    See Also
    --------
    adam : the formulas.

    Notes
    -----
    Semantics are those of `torch.optim.AdamW`, for one array. With `out=(param, exp_avg, exp_avg_sq)` the step is made in
    place.

    Examples
    --------
    >>> import numpy as np, xpnn
    >>> param, grad = np.array([1.0, 2.0]), np.array([0.5, -50.0])
    >>> exp_avg, exp_avg_sq = np.zeros(2), np.zeros(2)
    >>> for step in (1, 2):
    ...     _ = xpnn.adamw(param, grad, exp_avg, exp_avg_sq, step=step, lr=0.1, out=(param, exp_avg, exp_avg_sq))
    >>> param
    array([0.798101, 2.195902])
    """
    if weight_decay:
        param = (1 - lr * weight_decay) * param
    return moved(xp, param, -grad if maximize else grad, exp_avg, exp_avg_sq, max_exp_avg_sq, step, lr, beta1, beta2, eps)


def moved(xp, param, g, exp_avg, exp_avg_sq, max_exp_avg_sq, step, lr, beta1, beta2, eps):
    """θ after Adam's step along g, and m, v and the largest v (or None).

    With c² = 1 − β₂ᵗ, m / (√v / c + ε) is c m / (√v + c ε): so the numbers are made once, not for every element.
    """
    m = beta1 * exp_avg + (1 - beta1) * g
    v = beta2 * exp_avg_sq + (1 - beta2) * (g * g)
    most = None if max_exp_avg_sq is None else xp.maximum(max_exp_avg_sq, v)
    c = (1 - beta2**step) ** 0.5
    return param - lr * c / (1 - beta1**step) * (m / (xp.sqrt(v if most is None else most) + c * eps)), m, v, most
