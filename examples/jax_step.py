"""Train a perceptron on handwritten digits in JAX: one jitted step, whose gradients are the kernels' own.

python examples/jax_step.py
python examples/jax_step.py --steps 1000 --seed 3
"""

import click
import jax
import numpy as np
from network import xavier
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import xpnn
import xpnn.jax as xj

SIZES = (64, 128, 10)
BATCH = 64
RATE = 0.2


def logits_of(params, x):
    """Layers with tanh, and one without."""
    *hidden, last = params
    for weight, bias in hidden:
        x = xj.linear(x, weight, bias, activation=xpnn.tanh)
    return xj.linear(x, *last)


def loss_of(params, x, target):
    """The mean cross-entropy of a batch."""
    return xj.cross_entropy(logits_of(params, x), target, label_smoothing=0.1)


@jax.jit
def step(params, x, target):
    """One step of gradient descent: the new parameters, and the loss before it."""
    loss, gradients = jax.value_and_grad(loss_of)(params, x, target)
    return jax.tree.map(lambda p, dp: p - RATE * dp, params, gradients), loss


def train(steps, seed=0, report=lambda done, losses: None):
    """Train, and return the loss of every step and the accuracy on a quarter of the images, which is kept for that."""
    images, classes = load_digits(return_X_y=True)
    pixels = (images / 8 - 1).astype("float32")
    x, x_test, t, t_test = train_test_split(pixels, classes, test_size=0.25, stratify=classes, random_state=seed)
    rng = np.random.default_rng(seed)
    params, losses = xavier(SIZES, rng), []
    for done in range(steps):
        chosen = rng.choice(len(x), BATCH, replace=False)
        params, loss = step(params, x[chosen], t[chosen])
        losses.append(float(loss))
        report(done + 1, losses)
    return np.array(losses), float(np.mean(np.argmax(logits_of(params, x_test), axis=-1) == t_test))


@click.command()
@click.option("--steps", type=click.IntRange(min=1), default=400, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the split, the weights and the order.")
def main(steps, seed):
    """Train, and print the loss on the way and the test accuracy at the end."""
    every = max(1, steps // 10)

    def report(done, losses):
        if done % every == 0:
            print(f"step {done:4}  loss {np.mean(losses[-every:]):.4f}")

    _, accuracy = train(steps, seed, report)
    print(f"test accuracy {accuracy:.2%}")


if __name__ == "__main__":
    main()
