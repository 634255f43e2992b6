"""Softmax regression on more data than the workers may hold: Dask makes each block of rows when it is needed.

    python examples/dask_rows.py
    python examples/dask_rows.py --rows 2000000 --workers 4

Each step is one graph: logits, mean loss and gradient of a block by the fused loops, the weight's gradient a sum over the
blocks. Workers may not spill to disk; one that nears its limit is killed.
"""

import time

import click
import dask
import dask.array as da
import numpy as np

import xpnn

FEATURES, CLASSES, BLOCK = 256, 100, 10_000
RATE = 1.0


def data(rows, block=BLOCK):
    """Rows of numbers, and the class that a weight unknown to the training gives each; both lazy."""
    x = da.random.default_rng(0).standard_normal((rows, FEATURES), chunks=(block, FEATURES), dtype="float32")
    truth = np.random.default_rng(1).standard_normal((FEATURES, CLASSES), "float32")
    return x, (x @ truth).argmax(axis=1)


def gradient(x, target, weight):
    """The mean loss over all rows and its gradient by the weight; both lazy.

    A sum, divided: a mean would look at all targets before the first gradient, and these are made of x.
    """
    weight = da.from_array(weight, chunks=-1)
    loss, (dweight,) = xpnn.linear_cross_entropy.value_and_grad(x, weight, target, reduction="sum", wrt=("linear_weight",))
    return loss / len(x), dweight / len(x)


def train(x, target, steps, report=lambda step, loss, seconds: None):
    """Gradient descent over all rows at each step; the losses and the weight."""
    weight, losses = np.zeros((CLASSES, FEATURES), "float32"), []
    for step in range(steps):
        started = time.perf_counter()
        loss, dweight = dask.compute(*gradient(x, target, weight))
        weight -= RATE * dweight
        losses.append(float(loss))
        report(step, losses[-1], time.perf_counter() - started)
    return losses, weight


@click.command()
@click.option("--rows", type=click.IntRange(1), default=1_500_000, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=3, show_default=True)
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True)
@click.option("--memory-limit", default="500MB", show_default=True, help="Of each worker.")
def main(rows, steps, workers, memory_limit):
    """Train on worker processes of little memory, and print loss, time and peak memory."""
    from distributed import Client, LocalCluster

    memory = {f"distributed.worker.memory.{what}": False for what in ("target", "spill", "pause")}
    with (
        dask.config.set(memory),
        LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, memory_limit=memory_limit, dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        size = rows * FEATURES * 4 / 1e6
        print(
            f"{size:,.0f} MB of data in blocks of {BLOCK * FEATURES * 4 / 1e6:.0f} MB; {workers} workers of {memory_limit} each"
        )

        def report(step, loss, seconds):
            print(f"step {step}  loss {loss:.4f}  {seconds:.1f} s")

        train(*data(rows), steps, report)
        for worker, peak in client.run(peak_memory).items():
            print(f"{worker}: at most {peak / 1e6:,.0f} MB")


def peak_memory():
    """The most memory that this process has had, in bytes; NaN on Windows."""
    import sys

    if sys.platform == "win32":
        return float("nan")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
