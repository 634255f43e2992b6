"""What `xpnn.torch` adds to a small call: the kernel on arrays, the same on tensors, and PyTorch's own function, in turn.

python tools/torch_overhead.py
python tools/torch_overhead.py --json FILE
"""

import json
import statistics
import time
from pathlib import Path

import click
import torch
import torch.nn.functional as F  # noqa: N812
from rich.console import Console
from rich.table import Table

import xpnn.torch
from xpnn.benchmarks import machine

ROWS, COLUMNS = 8, 10


class Nothing(torch.autograd.Function):
    """The least that a function with a gradient of its own costs: one array kept, one number returned."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.new_empty(())

    @staticmethod
    def backward(ctx, dy):
        return ctx.saved_tensors[0]


def cases():
    """Name, and calls that differ in nothing but what is between the caller and the kernel."""
    x, target = torch.randn(ROWS, COLUMNS), torch.randint(0, COLUMNS, (ROWS,))
    variable, dy, ours = x.clone().requires_grad_(), torch.randn(ROWS, COLUMNS), xpnn.torch
    a, classes = x.numpy(), target.numpy()
    yield "relu", lambda: xpnn.relu(a), lambda: ours.relu(x), lambda: F.relu(x)
    yield "softmax", lambda: xpnn.softmax(a), lambda: ours.softmax(x, 1), lambda: F.softmax(x, 1)
    yield (
        "cross_entropy", lambda: xpnn.cross_entropy(a, classes), lambda: ours.cross_entropy(x, target),
        lambda: F.cross_entropy(x, target),
    )  # fmt: skip
    yield (
        "softmax, to be differentiated", lambda: xpnn.softmax(a), lambda: ours.softmax(variable, 1),
        lambda: F.softmax(variable, 1),
    )  # fmt: skip
    yield (
        "cross_entropy and its gradient", lambda: xpnn.cross_entropy.value_and_grad(a, classes),
        lambda: ours.cross_entropy(variable, target), lambda: F.cross_entropy(variable, target),
    )  # fmt: skip
    yield (
        "cross_entropy, then backward()", lambda: Nothing.apply(variable).backward(),
        lambda: ours.cross_entropy(variable, target).backward(), lambda: F.cross_entropy(variable, target).backward(),
    )  # fmt: skip
    yield (
        "softmax, then backward()", lambda: Nothing.apply(variable).backward(), lambda: ours.softmax(variable, 1).backward(dy),
        lambda: F.softmax(variable, 1).backward(dy),
    )  # fmt: skip


def medians(calls, rounds, repeats):
    """Microseconds of each call."""
    samples = [[] for _ in calls]
    for round_ in range(rounds + 1):
        for call, found in zip(calls, samples, strict=True):
            started = time.perf_counter()
            for _ in range(repeats):
                call()
            if round_:  # the first compiles
                found.append((time.perf_counter() - started) / repeats * 1e6)
    return [statistics.median(s) for s in samples]


@click.command()
@click.option("--rounds", default=60, show_default=True, type=click.IntRange(1))
@click.option("--repeats", default=500, show_default=True, type=click.IntRange(1))
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path))
def main(rounds, repeats, file):
    """Print what the adapter adds. With backward(), the first column is a function of one's own that does nothing."""
    recorded = {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "load_before": machine.load(), "machine": machine.describe()}
    table = Table("", "arrays, µs", "tensors", "PyTorch", "added", title=f"{ROWS} x {COLUMNS}, float32, one thread")
    torch.set_num_threads(1)
    found = []
    for name, *calls in cases():
        plain, adapter, theirs = medians(calls, rounds, repeats)
        found.append({"case": name, "plain_us": plain, "adapter_us": adapter, "pytorch_us": theirs})
        table.add_row(name, *(f"{us:.1f}" for us in (plain, adapter, theirs, adapter - plain)))
    Console().print(table)
    if file:
        file.write_text(json.dumps(recorded | {"cases": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
