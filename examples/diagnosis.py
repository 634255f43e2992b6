"""What the notes warn of, on handwritten digits: gradients that vanish, and units that die.

    python examples/digits.py --diagnose
    python examples/digits.py --diagnose --pictures docs

Ten layers of 64 units, once with sigmoid and once with relu, from the same weights, on the same batches. Then three layers of
128 relus, from an unlucky initialisation and from Xavier's, with plain gradient descent at too large a rate and with Adagrad.
"""

import itertools
from dataclasses import dataclass, field

import numpy as np
from network import xavier
from rich import box
from rich.table import Table
from threadpoolctl import threadpool_limits

import xpnn
from xpnn.plot import write

BATCH = 32
DEEP = (64, *[64] * 10, 10)
DEEP_STEPS, DEEP_RATE = 300, 0.05
WIDE = (64, *[128] * 3, 10)
WIDE_STEPS, EVERY, RUNS = 200, 10, 3
PLAIN_RATE, ADAGRAD_RATE = 0.6, 0.01  # six times what trains this network well; PyTorch's default
COLOURS = {"sigmoid": "#c2410c", "relu": "#1d4ed8", "unlucky": "#c2410c", "Xavier": "#1d4ed8"}


# --- a network whose every step can be looked at --------------------------------------------------------------------------


def adagrad(w, h, dw):
    xpnn.adagrad(w, dw, h, lr=ADAGRAD_RATE, out=(w, h))


def plain(w, h, dw):
    w -= PLAIN_RATE * dw


def unlucky(sizes, rng):
    """Weights of a small normal distribution and biases of a large one: many units are off, whatever their inputs are."""
    return [
        ((0.05 * rng.standard_normal((n2, n0))).astype("float32"), rng.standard_normal(n2).astype("float32"))
        for n0, n2 in itertools.pairwise(sizes)
    ]


def look(params, x, target, activation):
    """A batch's loss, (dW, db) for each layer, and what `xpnn.diagnose` takes: (activation, z, dW) for each layer."""
    a, steps = x, []
    for weight, bias in params[:-1]:
        z, through_linear = xpnn.linear.vjp(a, weight, bias)
        a, through_activation = activation.vjp(z)
        steps.append((z, through_linear, through_activation))
    logits, through_linear = xpnn.linear.vjp(a, *params[-1])
    loss, dlogits = xpnn.cross_entropy.value_and_grad(logits, target)
    da, dweight, dbias = through_linear(dlogits)
    gradients, layers = [(dweight, dbias)], [(None, logits, dweight)]
    for z, through_linear, through_activation in reversed(steps):
        da, dweight, dbias = through_linear(through_activation(da))
        gradients.append((dweight, dbias))
        layers.append((activation, z, dweight))
    return float(loss), gradients[::-1], layers[::-1]


def train(params, x, target, activation, step, steps, seed, every, watch):
    """Change the parameters in place, on random batches; `watch()` is called before every `every`-th step and at the end."""
    rng = np.random.default_rng(seed)
    memories = [tuple(np.zeros_like(p) for p in layer) for layer in params]
    for number in range(steps):
        if number % every == 0:
            watch()
        chosen = rng.integers(0, len(x), BATCH)
        _, gradients, _ = look(params, x[chosen], target[chosen], activation)
        for layer, memory, slopes in zip(params, memories, gradients, strict=True):
            for w, h, dw in zip(layer, memory, slopes, strict=True):
                step(w, h, dw)
    watch()


# --- the two experiments --------------------------------------------------------------------------------------------------


def vanishing(data, seed=0):
    """For sigmoid and relu: (loss, diagnosis) over all training images, before the first step and after the last."""
    x, _, target, _ = data

    def slow(w, h, dw):
        w -= DEEP_RATE * dw

    found = {}
    for activation in (xpnn.sigmoid, xpnn.relu):
        params = xavier(DEEP, np.random.default_rng(seed))
        seen = []

        def watch(params=params, activation=activation, seen=seen):
            loss, _, layers = look(params, x, target, activation)
            seen.append((loss, xpnn.diagnose(layers)))

        with threadpool_limits(1, "blas"):
            train(params, x, target, activation, slow, DEEP_STEPS, seed, DEEP_STEPS, watch)
        found[activation.__name__] = seen
    return found


@dataclass
class Runs:
    """Some runs from one initialisation with one optimiser."""

    dead: list = field(default_factory=list)  # of each run, at every `EVERY`-th step: the share over all hidden units
    losses: list = field(default_factory=list)  # after the last step, over all training images
    accuracies: list = field(default_factory=list)  # on the test images


def dying(data, seed=0):
    """The `Runs` of both initialisations with both optimisers."""
    x, x_test, target, target_test = data
    found = {}
    for initial, (name, step) in itertools.product((unlucky, xavier), (("SGD", plain), ("Adagrad", adagrad))):
        runs = found[initial.__name__.replace("x", "X"), name] = Runs()
        for run in range(seed, seed + RUNS):
            params = initial(WIDE, np.random.default_rng(run))
            dead = []

            def watch(params=params, dead=dead):
                _, _, layers = look(params, x, target, xpnn.relu)
                dead.append(np.mean([layer.dead for layer in xpnn.diagnose(layers[:-1]).layers]))

            with threadpool_limits(1, "blas"):
                train(params, x, target, xpnn.relu, step, WIDE_STEPS, run, EVERY, watch)
            runs.dead.append(dead)
            runs.losses.append(look(params, x, target, xpnn.relu)[0])
            logits = look(params, x_test, target_test, xpnn.relu)[2][-1][1]
            runs.accuracies.append(np.mean(np.argmax(logits, axis=-1) == target_test))
    return found


# --- what is shown --------------------------------------------------------------------------------------------------------


def vanishing_table(found, when):
    """Both networks' layers side by side, at the start (0) or at the end (-1)."""
    title = "at initialisation" if when == 0 else f"after {DEEP_STEPS} steps"
    table = Table(title=f"ten layers, {title}", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("layer", justify="right")
    for name in found:
        for column in (f"{name}: saturated", "dead", "gradient", "of next"):
            table.add_column(column, justify="right")
    for layers in zip(*(seen[when][1].layers for seen in found.values()), strict=True):
        cells = []
        for r in layers:
            cells += ["–", "–"] if r.activation is None else [f"{r.saturated:.0%}", f"{r.dead:.0%}"]
            cells += [f"{r.gradient:.1e}", "–" if r.ratio is None else f"{r.ratio:.2f}"]
        table.add_row(str(layers[0].number), *cells)
    losses = ", ".join(f"{name} {seen[when][0]:.3f}" for name, seen in found.items())
    table.caption, table.caption_justify = f"loss: {losses}", "left"
    return table


def dying_table(found):
    table = Table(
        title=f"three layers of relus, means of {RUNS} runs", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold"
    )
    for column in ("initialisation", "optimiser"):
        table.add_column(column)
    for column in ("dead at the start", f"after {WIDE_STEPS} steps", "loss", "test accuracy"):
        table.add_column(column, justify="right")
    for (initial, name), runs in found.items():
        first, last = np.mean(runs.dead, axis=0)[[0, -1]]
        rate = PLAIN_RATE if name == "SGD" else ADAGRAD_RATE
        shown = f"{first:.0%}", f"{last:.0%}", f"{np.mean(runs.losses):.3f}", f"{np.mean(runs.accuracies):.0%}"
        table.add_row(initial, f"{name}, rate {rate}", *shown)
    return table


def canvas(xlabel, ylabel):
    """A figure and its axes, without the state that pyplot would keep."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), facecolor="white", layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("white")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.6)
    return figure, axes


def vanishing_picture(found):
    figure, axes = canvas("layer, from the input to the output", "norm of the gradient of its weights")
    for name, seen in found.items():
        for (_, report), style, when in zip(seen, ("-", "--"), ("at initialisation", f"after {DEEP_STEPS} steps"), strict=True):
            norms = [layer.gradient for layer in report.layers]
            numbers = range(1, len(norms) + 1)
            axes.semilogy(numbers, norms, style, marker="o", markersize=3.5, color=COLOURS[name], label=f"{name}, {when}")
    axes.set_xticks(numbers)
    axes.legend(frameon=False, fontsize=9)
    return figure


def dying_picture(found):
    figure, axes = canvas("step", "dead units")
    steps = [*range(0, WIDE_STEPS, EVERY), WIDE_STEPS]
    for (initial, name), runs in found.items():
        style = {"color": COLOURS[initial], "linestyle": "-" if name == "SGD" else "--"}
        for dead in runs.dead:
            axes.plot(steps, dead, **style, linewidth=0.7, alpha=0.3)
        axes.plot(steps, np.mean(runs.dead, axis=0), **style, linewidth=2, label=f"{initial} initialisation, {name}")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper center")
    return figure


def show(data, seed, console, pictures):
    """Print the tables of both experiments, and draw them into a folder if one is given."""
    if not console.is_terminal:
        console.width = 110  # of the tables
    with console.status("ten layers of sigmoid and of relu"):
        found = vanishing(data, seed)
    for when in (0, -1):
        console.print(vanishing_table(found, when))
        console.print()
    with console.status(f"{RUNS} runs from each initialisation with each optimiser"):
        runs = dying(data, seed)
    console.print(dying_table(runs))
    if pictures is not None:
        for name, figure in (("vanishing", vanishing_picture(found)), ("dead-units", dying_picture(runs))):
            write(figure, pictures / f"{name}.png")
