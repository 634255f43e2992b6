"""Train a small causal language model in PyTorch on the text of NumPy's source files, with PyTorch's loss or with xpnn's.

    python examples/torch_lm.py
    python examples/torch_lm.py --loss torch --loss xpnn --steps 50
    python examples/torch_lm.py --loss xpnn --compile

The model has a vocabulary of 32,768 words, two layers of attention and 4.3 million parameters. The training code is the same
for all: `torch.nn.functional`'s functions. What differs is whether `xpnn.torch.patch()` is around it, and which function is
called: `cross_entropy` of all logits, or `linear_cross_entropy` of what the logits are made from. Each way runs in a process
of its own, from the same start on the same batches.
"""

import contextlib
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (as everybody calls it)
from large_vocab import VOCABULARY, words
from rich.console import Console
from rich.table import Table

from xpnn.benchmarks import machine

WIDTH, HEADS, LAYERS = 64, 4, 2
BATCH, LENGTH = 16, 128
RATE = 3e-3
WAYS = ("torch", "xpnn", "xpnn-linear", "torch-linear")  # whose functions; "-linear": without all logits at once
PARTS = {"loss": "loss, ms", "head": "products and loss, ms", "step": "step, ms"}  # medians


class Block(torch.nn.Module):
    """Attention to what came before, then two layers on each word."""

    def __init__(self):
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.up, self.down = torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        rows, length, _ = x.shape
        qkv = self.qkv(self.norms[0](x)).view(rows, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0), is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Model(torch.nn.Module):
    """From words to what the logits of the next ones are made from; `head` makes them."""

    def __init__(self, vocabulary):
        super().__init__()
        self.embedding, self.places = torch.nn.Embedding(vocabulary, WIDTH), torch.nn.Embedding(LENGTH, WIDTH)
        self.blocks = torch.nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.head = torch.nn.Parameter(torch.randn(vocabulary, WIDTH) * WIDTH**-0.5)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.places.weight[: tokens.shape[1]]
        return self.norm(self.blocks(x)).flatten(0, 1)


def loss_by_logits(hidden, head, target, criterion, clock):
    """The usual way. The loss and its gradient are a part of their own, to be timed: what lies between two products."""
    logits = hidden @ head.T
    with clock("loss"):
        cut = logits.detach().requires_grad_()
        loss = criterion(cut, target)
        loss.backward()
    logits.backward(cut.grad)
    return loss.detach()


def loss_by_chunks(hidden, head, target, criterion, clock):
    """The loss straight from what the logits are made from."""
    loss = criterion(hidden, head, target)
    loss.backward()
    return loss.detach()


def train(way, text, steps, seed=0, compiled=False, vocabulary=VOCABULARY):
    """Train, and return the losses, seconds of each step, of its head and of its loss, and the peak of memory."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = Model(vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    library, _, linear = way.partition("-")
    patched = contextlib.nullcontext()
    if library == "xpnn":
        import xpnn.torch

        patched = xpnn.torch.patch()
    loss_of, criterion = loss_by_logits, lambda logits, target: F.cross_entropy(logits, target)
    if linear:
        options = torch.nn.LinearCrossEntropyOptions() if library == "torch" else None  # PyTorch's chunks are to be asked for
        loss_of = loss_by_chunks
        criterion = lambda hidden, head, target: F.linear_cross_entropy(hidden, head, target, options=options)  # noqa: E731
    body = model
    if compiled:
        body, criterion = (torch.compile(f, fullgraph=True) for f in (model, criterion))
    seconds = {part: [] for part in PARTS}

    @contextlib.contextmanager
    def clock(part):
        started = time.perf_counter()
        yield
        seconds[part].append(time.perf_counter() - started)

    losses, before = [], memory("VmRSS")
    with patched:
        for _ in range(steps):
            at = rng.integers(0, len(text) - LENGTH, BATCH)
            batch = torch.from_numpy(text[at[:, None] + np.arange(LENGTH + 1)])
            with clock("step"):
                hidden = body(batch[:, :-1])
                with clock("head"):
                    cut = hidden.detach().requires_grad_()
                    loss = loss_of(cut, model.head, batch[:, 1:].flatten(), criterion, clock)
                hidden.backward(cut.grad)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
    medians = {part: float(np.median(times)) for part, times in seconds.items() if times}
    peak = memory("VmHWM")
    return {
        "way": way,
        "compiled": compiled,
        "parameters": sum(p.numel() for p in model.parameters()),
        "losses": losses,
        "seconds": medians,
        "peak_bytes": peak,
        "peak_bytes_of_training": peak and peak - before,
    }


def memory(what):
    """Bytes of memory that this process holds (VmRSS) or held at most (VmHWM); None where the system is not Linux."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    return int(next(line for line in status.splitlines() if line.startswith(what)).split()[1]) * 1024


@click.command()
@click.option("--steps", default=200, show_default=True, type=click.IntRange(1))
@click.option("--loss", "ways", type=click.Choice(WAYS), multiple=True, default=WAYS, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="torch.compile(fullgraph=True) for the model and the loss.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there too.")
def main(steps, ways, seed, compiled, file):
    """Train, once for each way to compute the loss, and print what they lost and took."""
    console = Console()
    console.print(
        f"vocabulary {VOCABULARY:,}; {BATCH * LENGTH} words a step: {BATCH * LENGTH * VOCABULARY * 4 / 2**20:.0f} MB of logits"
    )
    text, _ = words()
    results = []
    recorded = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_before": machine.load(),
        "machine": machine.describe(),
        "command": " ".join(["python", *sys.argv]),
        "steps": steps,
    }
    for way in ways:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            results.append(process.submit(train, way, text, steps, seed, compiled).result())
        if file:  # what is known so far: all ways may take a quarter of an hour
            file.write_text(json.dumps(recorded | {"runs": results}, indent=1) + "\n", encoding="utf-8")
    table = Table("", *ways)
    for n in sorted({1, steps // 2, steps} - {0}):
        table.add_row(f"loss of step {n}", *(f"{r['losses'][n - 1]:.4f}" for r in results))
    for part, what in PARTS.items():
        table.add_row(what, *(f"{1000 * r['seconds'][part]:.1f}" if part in r["seconds"] else "" for r in results))
    for key, what in {"peak_bytes": "peak of memory, MB", "peak_bytes_of_training": "beyond that before step 1"}.items():
        table.add_row(what, *(f"{r[key] / 1e6:.0f}" if r[key] else "" for r in results))
    console.print(table)
    for r in results[1:]:
        apart = np.max(np.abs(np.subtract(r["losses"], results[0]["losses"])) / np.abs(results[0]["losses"]))
        console.print(f"{r['way']}: losses differ from those of {results[0]['way']} by at most {apart:.1e} of them")


if __name__ == "__main__":
    main()
