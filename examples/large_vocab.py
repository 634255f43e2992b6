"""Train a next-word model with a vocabulary of 32,768 words on the text of NumPy's own source files.

    python examples/large_vocab.py
    python examples/large_vocab.py --steps 400 --loss chunks

Four words are embedded and go through one hidden layer; its output times a weight for each word of the vocabulary gives
the logits of the fifth. The loss is computed twice: from all logits of a batch (256 MB), and by `linear_cross_entropy`,
which holds a part of them at a time. Both runs start alike and must lose alike.
"""

import re
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

import xpnn

VOCABULARY = 32_768
CONTEXT, EMBEDDED, HIDDEN = 4, 32, 64
BATCH = 2048
RATE, FRICTION = 0.5, 0.9


def words():
    """NumPy's source files as one sequence of word numbers: names, numbers and signs, the rarest being one and the same."""
    files = sorted(f for kind in ("*.py", "*.pyi") for f in Path(np.__file__).parent.rglob(kind))
    found = [w for f in files for w in re.findall(r"\w+|[^\w\s]", f.read_text(encoding="utf-8", errors="ignore"))]
    common = [w for w, _ in Counter(found).most_common(VOCABULARY - 1)]
    number = {w: k for k, w in enumerate(common)}
    return np.array([number.get(w, VOCABULARY - 1) for w in found]), len(number) + 1


def initial(rng):
    """The embedding, the hidden layer's weight and bias, and a weight for each word."""
    shapes = {"embedding": (VOCABULARY, EMBEDDED), "hidden": (HIDDEN, CONTEXT * EMBEDDED), "bias": (HIDDEN,)}
    shapes["head"] = (VOCABULARY, HIDDEN)
    return {
        n: np.zeros(s, np.float32) if n == "bias" else (rng.standard_normal(s) * s[-1] ** -0.5).astype(np.float32)
        for n, s in shapes.items()
    }


def from_logits(h, head, target):
    """The loss and its gradients, by way of all logits."""
    logits = xpnn.linear(h, head)
    loss, dlogits = xpnn.cross_entropy.value_and_grad(logits, target, out=logits)
    return loss, (dlogits @ head, dlogits.T @ h)


LOSSES = {"logits": from_logits, "chunks": xpnn.linear_cross_entropy.value_and_grad}


def gradients(params, context, target, loss_of):
    """The loss of a batch and the gradient by every parameter; the loss part's peak of memory if tracemalloc runs."""
    embedded = params["embedding"][context].reshape(len(context), -1)
    h, pull_hidden = xpnn.linear.vjp(embedded, params["hidden"], params["bias"], activation=xpnn.tanh)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    loss, (dh, dhead) = loss_of(h, params["head"], target)
    peak = tracemalloc.get_traced_memory()[1] - before - dh.nbytes - dhead.nbytes
    dembedded, dhidden, dbias = pull_hidden(dh)
    dembedding = np.zeros_like(params["embedding"])
    np.add.at(dembedding, context, dembedded.reshape(*context.shape, EMBEDDED))
    return loss, {"embedding": dembedding, "hidden": dhidden, "bias": dbias, "head": dhead}, peak


def train(text, steps, loss_of, seed, tell=lambda done, losses: None):
    """Losses by step, peak of memory of the loss part, seconds."""
    rng = np.random.default_rng(seed)
    params = initial(rng)
    velocity = {n: np.zeros_like(p) for n, p in params.items()}
    losses, peak, started = [], 0, time.perf_counter()
    for step in range(steps):
        at = rng.integers(CONTEXT, len(text), BATCH)
        context, target = text[at[:, None] + np.arange(-CONTEXT, 0)], text[at]
        if step == 1:  # once: it takes time
            tracemalloc.start()
        loss, gradient, extra = gradients(params, context, target, loss_of)
        if step == 1:
            tracemalloc.stop()
            peak = extra
        losses.append(float(loss))
        for n, g in gradient.items():
            velocity[n] *= FRICTION
            velocity[n] += g
            params[n] -= RATE * velocity[n]
        tell(step + 1, losses)
    return np.array(losses), peak, time.perf_counter() - started


@click.command()
@click.option("--steps", default=300, show_default=True, type=click.IntRange(2))
@click.option("--loss", "which", type=click.Choice([*LOSSES, "both"]), default="both", show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(steps, which, seed):
    """Train, once for each way to compute the loss, and print what they lost and took."""
    text, known = words()
    console = Console()
    console.print(
        f"{len(text):,} words, {known:,} of them known; {BATCH} x {VOCABULARY} logits: {BATCH * VOCABULARY * 4 / 2**20:.0f} MB"
    )
    runs = {}
    with console.status("") as status:  # shown where somebody sees it
        for name in LOSSES if which == "both" else [which]:

            def tell(done, losses, name=name):
                status.update(f"{name}: step {done} of {steps}, loss {losses[-1]:.3f}")

            runs[name] = train(text, steps, LOSSES[name], seed, tell)
    table = Table(title="mean loss over ten steps")
    table.add_column("after step", justify="right")
    for name in runs:
        table.add_column(name, justify="right")
    for last in sorted({min(steps, n) for n in (10, steps // 8, steps // 4, steps // 2, steps)} - {0}):
        table.add_row(str(last), *(f"{losses[max(0, last - 10) : last].mean():.4f}" for losses, _, _ in runs.values()))
    console.print(table)
    for name, (_, peak, seconds) in runs.items():
        console.print(f"{name}: {peak / 2**20:.0f} MB for the loss beyond its gradients, {seconds / steps:.2f} s a step")
    if len(runs) == 2:
        a, b = (losses for losses, _, _ in runs.values())
        console.print(f"the curves differ by at most {np.max(np.abs(a - b)):.1e}")


if __name__ == "__main__":
    main()
