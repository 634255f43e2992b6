"""What kernels take along an axis that is not the last, beside PyTorch and a copy: docs/speed.md tells what it shows.

    python tools/axis.py FILE.json
    python tools/readme_table.py axis FILE.json

Classes come second, as PyTorch's images and sequences have them. Medians, measured in turn; results compared first. All
results are new arrays, in each library as it makes them, but for "in place", which writes over what is given.
"""

import datetime
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import xpnn
from xpnn.backends.numba import pool
from xpnn.benchmarks import machine
from xpnn.benchmarks.report import duration
from xpnn.benchmarks.timing import Contender, interleave

SHAPES = (
    ((8, 19, 256, 256), "Cityscapes classes"),
    ((8, 21, 100, 100), "Pascal VOC classes"),
    ((16, 10, 32, 32), "a small batch"),
    ((4, 150, 128, 128), "ADE20K classes"),
    ((2, 1000, 64, 64), "ImageNet classes"),
    ((8, 8000, 512), "a language model's sequences"),
)
SECONDS = 1.0


def racing(shape: tuple[int, ...]) -> dict[str, dict[str, Contender]]:
    """What is timed side by side, by kernel."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(pool.count())
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    target = rng.integers(0, shape[1], (shape[0], *shape[2:]))
    y = xpnn.softmax(x, axis=1)
    over, result = x.copy(), np.empty_like(x)
    tx, tdy, ty, ttarget = map(torch.from_numpy, (x, dy, y, target))
    leaf = tx.clone().requires_grad_()

    def loss() -> Any:
        leaf.grad = None
        found = functional.cross_entropy(leaf, ttarget)
        found.backward()
        return found.item(), leaf.grad

    copy = Contender(functools.partial(np.copyto, result, x))
    return {
        "softmax forward": {
            "xpnn": Contender(functools.partial(xpnn.softmax, x, axis=1)),
            "in place": Contender(functools.partial(xpnn.softmax, over, axis=1, out=over)),
            "torch": Contender(functools.partial(torch.softmax, tx, 1)),
            "copy": copy,
        },
        "softmax backward": {
            "xpnn": Contender(functools.partial(xpnn.softmax.backward, dy, y, axis=1)),
            "torch": Contender(functools.partial(torch._softmax_backward_data, tdy, ty, 1, torch.float32)),
            "copy": copy,
        },
        "cross_entropy value_and_grad": {
            "xpnn": Contender(functools.partial(xpnn.cross_entropy.value_and_grad, x, target, axis=1)),
            "in place": Contender(functools.partial(xpnn.cross_entropy.value_and_grad, over, target, axis=1, out=over)),
            "torch": Contender(loss),
            "copy": copy,
        },
    }


def agree(one: Callable[[], Any], other: Callable[[], Any]) -> None:
    """Raise where two calls' results differ."""
    for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (one(), other())), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-6)


def main() -> None:
    """Measure, print and write."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    rows = []
    for shape, source in SHAPES:
        for name, contenders in racing(shape).items():
            agree(contenders["xpnn"].call, contenders["torch"].call)
            seconds = {n: t.seconds for n, t in interleave(contenders, SECONDS).items()}
            rows.append({"kernel": name, "shape": shape, "source": source, **seconds})
            print(name, shape, ", ".join(f"{n} {duration(s)}" for n, s in seconds.items()), flush=True)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    document = {"date": date, "machine": machine.describe(), "rows": rows}
    Path(sys.argv[1]).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
