"""Processes started in every way, interrupts, and more elements than 32 bits can count."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

import numpy as np
import pytest

import xpnn

START = [m for m in ("fork", "spawn", "forkserver") if m in multiprocessing.get_all_start_methods()]


@pytest.mark.parametrize("method", START)
@pytest.mark.parametrize("used", [False, True], ids=["unused before", "used before"])
def test_workers(python: Callable[..., str], tmp_path: object, method: str, used: bool) -> None:
    """Two worker processes compute what their parent does, whether or not it has used threads before they started."""
    script = tmp_path / "workers.py"  # type: ignore[operator]
    script.write_text(
        f"""
import multiprocessing, warnings
import numpy as np, xpnn
warnings.simplefilter("ignore")  # forking beside threads is what is tested
X = np.random.default_rng(0).normal(size=(900, 700))
T = np.arange(900) % 700

def work(k):
    return xpnn.cross_entropy.value_and_grad(X + k, T)[1].sum(axis=0), xpnn.softmax(X[:4] + k)

if __name__ == "__main__":
    if {used}:
        work(0)
    with multiprocessing.get_context({method!r}).Pool(2) as pool:
        found = pool.map_async(work, range(6)).get(timeout=120)
    expected = [work(k) for k in range(6)]
    print(all(np.array_equal(a, b) for f, e in zip(found, expected) for a, b in zip(f, e)))
"""
    )
    code = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    if method != "fork":  # a child imports the script by its name
        run = f"[sys.executable, {str(script)!r}], capture_output=True, text=True"
        code = f"import subprocess, sys; print(subprocess.run({run}).stdout, end='')"
    assert python(code, XPNN_NUM_THREADS="2").splitlines()[-1] == "True"


def test_data_loader(python: Callable[..., str]) -> None:
    """PyTorch's worker processes, started after their parent used threads."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    code = f"""
        import warnings
        import numpy as np, torch, xpnn
        warnings.simplefilter("ignore")  # forking beside threads is what is tested

        class Rows(torch.utils.data.Dataset):
            def __len__(self):
                return len(x)

            def __getitem__(self, k):
                return xpnn.softmax(x[k])

        x = np.random.default_rng(0).normal(size=(8, 300, 700)).astype("float32")
        expected = [xpnn.softmax(row) for row in x]
        how = dict(batch_size=None, num_workers=2, timeout=120, multiprocessing_context={START[0]!r})
        found = list(torch.utils.data.DataLoader(Rows(), **how))
        print(len(found), all(np.array_equal(np.asarray(f), e) for f, e in zip(found, expected, strict=True)))
    """
    if START[0] == "spawn":
        pytest.skip("a script's own classes cannot be sent to a spawned worker")
    assert python(code, XPNN_NUM_THREADS="2").splitlines()[-1] == "8 True"


def test_interrupt(python: Callable[..., str]) -> None:
    """Ctrl-C during a long call is raised when it returns; the next calls are right."""
    code = """
        import _thread, signal, threading
        import numpy as np, xpnn

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
        x = np.random.default_rng(0).normal(size=(2000, 3000))
        expected = xpnn.softmax(x)
        begun = threading.Event()

        def interrupt():
            begun.wait()
            _thread.interrupt_main()

        threading.Thread(target=interrupt).start()
        try:
            while True:
                begun.set()
                xpnn.softmax(x)
        except KeyboardInterrupt:
            print("interrupted", np.array_equal(xpnn.softmax(x), expected))
    """
    assert python(code, XPNN_NUM_THREADS="2") == "interrupted True\n"


def test_beyond_32_bits() -> None:
    """Rows that lie on one another: more elements than 31 bits count, in little memory."""
    row = np.random.default_rng(0).normal(size=2000).astype(np.float32)
    x = np.broadcast_to(row, (1_100_000, 2000))
    assert x.size > 2**31
    np.testing.assert_array_equal(xpnn.logsumexp(x), np.full(len(x), xpnn.logsumexp(row)))
    target = np.full(len(x), 7)
    loss = xpnn.cross_entropy(x, target, reduction="none")
    np.testing.assert_array_equal(loss, np.full(len(x), xpnn.cross_entropy(row[None], target[:1])))
