"""64 Python threads call different kernels for a while; every result is compared. Exits 1 if one is wrong or raises.

python tools/soak.py [SECONDS]
"""

import collections
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import xpnn

THREADS = 64


def works() -> dict[str, Callable[[], Any]]:
    """Calls over small and large arrays, short rows and long ones, by rows and by planes, with products in between."""
    rng = np.random.default_rng(0)
    x, w, b = rng.normal(size=(600, 700)), rng.normal(size=(40, 700)), rng.normal(size=40)
    small, images = rng.normal(size=(5, 10)), rng.normal(size=(3, 7, 40, 30))
    target, classes, places = rng.integers(0, 700, 600), rng.integers(0, 10, 5), rng.integers(0, 7, (3, 40, 30))
    dy = rng.normal(size=x.shape)
    return {
        "softmax": lambda: xpnn.softmax(x),
        "softmax of few": lambda: xpnn.softmax(small),
        "softmax along axis 1": lambda: xpnn.softmax(images, axis=1),
        "softmax in single": lambda: xpnn.softmax(x.astype(np.float32)),
        "sigmoid": lambda: xpnn.sigmoid(x),
        "tanh backward": lambda: xpnn.tanh.vjp(x)[1](dy),
        "log_softmax backward": lambda: xpnn.log_softmax.vjp(x)[1](dy),
        "cross_entropy": lambda: xpnn.cross_entropy.value_and_grad(x, target)[1],
        "cross_entropy of few": lambda: xpnn.cross_entropy.value_and_grad(small, classes)[1],
        "cross_entropy of images": lambda: xpnn.cross_entropy.value_and_grad(images, places, axis=1)[1],
        "linear": lambda: xpnn.linear(x, w, b, activation=xpnn.relu),
        "linear_cross_entropy": lambda: xpnn.linear_cross_entropy(x, w, target % 40),
    }


def main() -> None:
    """Run and report."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    calls = works()
    with xpnn.use_backend("numpy"):
        truth = {name: call() for name, call in calls.items()}
    counted: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    lock, names = threading.Lock(), list(calls)
    end = time.monotonic() + seconds

    def run(number: int) -> None:
        k = number
        while time.monotonic() < end:
            name = names[k % len(names)]
            try:
                right = np.allclose(calls[name](), truth[name], rtol=1e-4, atol=1e-6)
            except Exception as error:
                right, name = False, f"{name}: {error!r}"
            with lock:
                counted[name] += 1
                if not right:
                    wrong.append(name)
            k += 1

    threads = [threading.Thread(target=run, args=(n,)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"{THREADS} threads, {seconds:g} s, {sum(counted.values()):,} calls of {len(names)} kinds, {len(wrong)} wrong")
    sys.exit("\n".join(wrong[:10]) if wrong else 0)


if __name__ == "__main__":
    main()
