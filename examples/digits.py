"""Train a multi-layer perceptron on scikit-learn's handwritten digits with nothing but this library's kernels.

    python examples/digits.py --activation relu --optimizer adamw
    python examples/digits.py --activation tanh --backend numpy --seed 3
    python examples/digits.py --diagnose

1,797 images of 8×8 pixels. A quarter of them, drawn anew for each seed, is kept for the test.
"""

import contextlib
import functools
from pathlib import Path

import click
import numpy as np
from network import backward, forward, xavier
from rich.console import Console
from rich.progress import Progress
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits

import xpnn

ACTIVATIONS = {"sigmoid": xpnn.sigmoid, "tanh": xpnn.tanh, "relu": xpnn.relu}
HIDDEN = (256,)
BATCH = 32
SMOOTHING = 0.1
# the step, how many arrays it keeps for each parameter, and the learning rate, which falls to zero along a straight line
OPTIMIZERS = {
    "sgd": (functools.partial(xpnn.sgd, momentum=0.9), 1, 0.05),
    "adagrad": (xpnn.adagrad, 1, 0.02),
    "adam": (xpnn.adam, 2, 0.003),
    "adamw": (xpnn.adamw, 2, 0.003),
}


def digits(seed):
    """Training images, test images and their classes; pixels in (−1, 1), about half of them below zero."""
    images, classes = load_digits(return_X_y=True)
    pixels = (images / 8 - 1).astype("float32")
    return train_test_split(pixels, classes, test_size=0.25, stratify=classes, random_state=seed)


def train(
    activation=xpnn.relu,
    optimizer="sgd",
    *,
    epochs=30,
    seed=0,
    backend="auto",
    report=lambda epoch, losses, accuracy: None,
):
    """Train, and return the loss of every step and the accuracy on the test images.

    `report` is called after each epoch.
    """
    x_train, x_test, t_train, t_test = digits(seed)
    rng = np.random.default_rng(seed)
    params = xavier((x_train.shape[1], *HIDDEN, 10), rng)
    move, kept, fastest = OPTIMIZERS[optimizer]
    states = [[[np.zeros_like(p) for _ in range(kept)] for p in layer] for layer in params]
    steps = len(x_train) // BATCH
    losses = []
    accuracy = 0.0
    # matrices this small multiply faster on one BLAS thread than on several
    with xpnn.use_backend(backend), threadpool_limits(1, "blas"):
        for epoch in range(epochs):
            options = {"lr": fastest * (1 - epoch / epochs)}
            for chosen in rng.permutation(len(x_train))[: steps * BATCH].reshape(steps, BATCH):
                logits, caches = forward(params, x_train[chosen], activation)
                loss, dlogits = xpnn.cross_entropy.value_and_grad(logits, t_train[chosen], label_smoothing=SMOOTHING)
                losses.append(float(loss))
                if optimizer != "sgd":
                    options["step"] = len(losses)
                for layer, known, gradients in zip(params, states, backward(dlogits, caches), strict=True):
                    for w, state, dw in zip(layer, known, gradients, strict=True):
                        move(w, dw, *state, **options, out=(w, *state))
            logits, _ = forward(params, x_test, activation)
            accuracy = float(np.mean(np.argmax(logits, axis=-1) == t_test))
            report(epoch + 1, losses[-steps:], accuracy)
    return losses, accuracy


@click.command()
@click.option("--activation", type=click.Choice(list(ACTIVATIONS)), default="relu", show_default=True)
@click.option("--optimizer", type=click.Choice(list(OPTIMIZERS)), default="sgd", show_default=True)
@click.option("--backend", type=click.Choice(["auto", "numpy", "numba"]), default="auto", show_default=True)
@click.option("--epochs", type=click.IntRange(min=1), default=30, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the split, the weights and the order.")
@click.option(
    "--diagnose", is_flag=True, help="Instead: where gradients vanish and units die, in deep and in unlucky networks."
)
@click.option("--pictures", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="FOLDER",
              help="With --diagnose: also draw vanishing.png and dead-units.png there.")  # fmt: skip
def main(activation, optimizer, backend, epochs, seed, diagnose, pictures):
    """Train a perceptron on handwritten digits and print its loss and test accuracy."""
    console = Console()
    if diagnose:
        import diagnosis

        with xpnn.use_backend(backend):
            diagnosis.show(digits(seed), seed, console, pictures)
        return
    every = max(1, epochs // 10)
    progress = Progress(console=console, transient=True) if console.is_terminal else contextlib.nullcontext()
    with progress:
        bar = progress.add_task(activation, total=epochs) if console.is_terminal else None

        def report(epoch, losses, accuracy):
            if bar is not None:
                progress.advance(bar)
            if epoch % every == 0 or epoch == epochs:
                console.print(f"epoch {epoch:3}  loss {np.mean(losses):.4f}  test accuracy {accuracy:.2%}", highlight=False)

        train(ACTIVATIONS[activation], optimizer, epochs=epochs, seed=seed, backend=backend, report=report)


if __name__ == "__main__":
    main()
