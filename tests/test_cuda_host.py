"""Running CUDA kernels on the CPU finds what is wrong with them: planted bugs, conversions, sanitizers, orders of execution."""

from __future__ import annotations

import ctypes
import faulthandler
import platform
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_helpers import fenced, launch

import xpnn
from xpnn.backends.cupy import host
from xpnn.backends.cupy.kernel import MEMORY
from xpnn.backends.cupy.regime import Device

pytest.importorskip("cupy", reason="CuPy is not installed: no CUDA kernel runs on the CPU")
if sys.platform != "linux" or host.compiler() is None:
    pytest.skip("no C++ compiler on Linux: no CUDA kernel runs on the CPU", allow_module_level=True)

SEEDS = range(4)
SHARED = f"{MEMORY} float* s = reinterpret_cast<float*>(memory);"


# --- planted bugs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bug:
    """A kernel, what is changed in it, and how that shows.

    The body has `out`, `in`, `n`, and t for the thread. `plant` is a part of it, and what stands there instead in the wrong
    version. `caught` is found in the message of an error; None where there is no error but a wrong result. `want` gives the
    result for the array 1, 2, 3, ... `before` puts the page that may not be touched before the arrays.
    """

    name: str
    body: str
    plant: tuple[str, str]
    want: Callable[[np.ndarray], Any]
    caught: str | None = None
    threads: int = 128
    shared: int = 512
    blocks: int = 1
    cluster: int = 1
    size: int = 128
    before: bool = False

    def kernel(self, wrong: bool) -> str:
        assert self.body.count(self.plant[0]) == 1, self.name
        body = self.body.replace(*self.plant) if wrong else self.body
        cluster = f"__cluster_dims__({self.cluster}, 1, 1) " if self.cluster > 1 else ""
        return (
            f'extern "C" __global__ void {cluster}__launch_bounds__({self.threads})\n'
            f"{self.name}_{'wrong' if wrong else 'right'}(float* out, const float* in, int n) {{\n"
            f"const int t = threadIdx.x;\n{body}\n}}\n"
        )

    def run(self, wrong: bool, seed: int, **changed: Any) -> np.ndarray:
        """The result of one version under one order."""
        x = fenced(np.arange(1, self.size + 1, dtype=np.float32), self.before)
        out = fenced(np.full(self.size, np.nan, np.float32), self.before)
        shape = {"blocks": self.blocks, "threads": self.threads, "shared": self.shared} | changed
        name = f"{self.name}_{'wrong' if wrong else 'right'}"
        launch(unit(), name, out, x, ctypes.c_int(self.size), on=host.Host(seed=seed), **shape)
        return np.array(out)


REVERSE = f"""{SHARED}
s[t] = in[t];
__syncthreads();
out[t] = s[127 - t];"""
ROUNDS = f"""{SHARED}
float v = 0;
for (int k = 0; k < 4; ++k) {{
  s[t] = in[t] + k;
  __syncthreads();
  v += s[(t + 32) % 128];
  __syncthreads();  // before the next round
}}
out[t] = v;"""
SHUFFLE = """float v = in[t];
for (int o = 16; o; o /= 2) v += __shfl_xor_sync(0xffffffffu, v, o);
out[t] = v;"""
CLUSTER = f"""{SHARED}
const unsigned rank = cluster_rank();
cluster_arrive();
cluster_wait();
if (t < 4) put(s + rank, t, in[blockIdx.x * 32]);
cluster_arrive();  // what was put is there
cluster_wait();
out[blockIdx.x * 32 + t] = s[0] + s[1] + s[2] + s[3];
cluster_arrive();  // the end
cluster_wait();  // nobody leaves before"""
NEIGHBOUR = f"{SHARED}\ns[t] = in[t];\n__syncwarp();\nout[t] = s[t ^ 1];"
ARRIVE = "cluster_arrive();  // what was put is there"
GUARDED = "float v = t < n"
ENDED, BOUNDS, UNDEFINED = "ends while|has ended before", "out of bounds", "undefined behaviour"
PACKS = """struct alignas(16) Four { float v[4]; };
const Four p = *reinterpret_cast<const Four*>(in + 4 * t);
*reinterpret_cast<Four*>(out + 4 * t) = p;"""


def same(x: np.ndarray) -> np.ndarray:
    return x


def lanes(x: np.ndarray) -> np.ndarray:
    return np.repeat(x.reshape(-1, 32).sum(1), 32)


def peers(x: np.ndarray) -> np.ndarray:
    return np.repeat(x[::32].reshape(-1, 4).sum(1), 128)


def backwards(x: np.ndarray) -> np.ndarray:
    return x[::-1]


def delayed(x: np.ndarray) -> np.ndarray:
    return np.r_[x[:1], x[:-1]]


def summed(x: np.ndarray) -> np.ndarray:
    return 4 * np.roll(x, -32) + 6


def clusters(name: str, plant: tuple[str, str], caught: str | None = None) -> Bug:
    return Bug(name, CLUSTER, plant, peers, caught, threads=32, shared=16, blocks=8, cluster=4, size=256)


BUGS = [
    # shared memory and barriers
    Bug("no_barrier", REVERSE, ("__syncthreads();", ""), backwards),
    Bug("no_barrier_before_reuse", ROUNDS, ("__syncthreads();  // before", "// before"), summed),
    Bug("no_barrier_of_the_warp", NEIGHBOUR, ("__syncwarp();", ""), lambda x: x.reshape(-1, 2)[:, ::-1].ravel()),
    Bug("uninitialised", f"{SHARED}\ns[t] = 0;\ns[t] += in[t];\nout[t] = s[t];", ("s[t] = 0;", ""), same),
    Bug("barrier_for_some_warps", REVERSE, ("__sync", "if (t < 96) __sync"), backwards, ENDED),
    Bug("barrier_for_some_lanes", REVERSE, ("__sync", "if (in[t] > 5) __sync"), backwards, ENDED),
    Bug("early_return", REVERSE, ("__sync", "if (t == 5) return;\n__sync"), backwards, ENDED),
    Bug(
        "two_barriers", REVERSE, ("__syncthreads();", "if (t < 64) {\n__syncthreads();\n} else {\n__syncthreads();\n}"),
        backwards, r"__syncthreads in line \d+ while others wait in line \d+",
    ),
    Bug("one_round_less", f"{ROUNDS}\n__syncthreads();", ("k < 4", "k < (t < 32 ? 3 : 4)"), summed, "others wait in line"),
    Bug("deadlock", REVERSE, ("__sync", "if (t == 40) __syncwarp();\n__sync"), backwards, "deadlock.* thread 40 waits in line"),
    # warps
    Bug("shuffle_for_half_a_warp", SHUFFLE, ("v += __", "if (t % 32 < 16) v += __"), lanes, ENDED),
    Bug("shuffle_for_one_lane_less", SHUFFLE, ("for", "if (t != 77) for"), lanes, ENDED),
    Bug("shuffle_beside_barrier", SHUFFLE, ("for", "if (t == 3) __syncthreads(); else for"), lanes, f"deadlock|{ENDED}"),
    Bug("shuffle_mask", SHUFFLE, ("0xffffffffu", "0xffffu"), lanes, "part of the warp"),
    Bug("shuffle_width", SHUFFLE, ("v, o)", "v, o, 16)"), lanes),
    Bug("two_shuffles", SHUFFLE, ("out", "if (t % 2) __syncwarp();\nelse\n__syncwarp();\nout"), lanes, "others wait in line"),
    # bounds
    Bug("read_after", f"{GUARDED} ? in[t] : 0;\nif (t < n) out[t] = v;", ("n ?", "n + 1 ?"), same, BOUNDS, size=100),
    Bug("write_after", f"{GUARDED} ? in[t] : 0;\nif (t < n) out[t] = v;", ("n)", "n + 1)"), same, BOUNDS, size=100),
    Bug("read_before", "out[t] = in[t ? t - 1 : 0];", ("t ? t - 1 : 0", "t - 1"), delayed, BOUNDS, before=True),
    Bug("write_before", "out[127 - t] = in[t];", ("127 - t", "126 - t"), backwards, BOUNDS, before=True),
    Bug("shared_after", REVERSE, ("s[127 - t]", "s[128 - t]"), backwards, BOUNDS),
    Bug("shared_written_after", ROUNDS, ("s[t] = in", "s[t + 1] = in"), summed, BOUNDS),
    Bug("shared_written_before", REVERSE, ("s[t] = in[t]", "s[t - 1] = s[t] = in[t]"), backwards, "next to shared memory"),
    Bug("array", "float a[4] = {2, 2, 2, 2};\nout[t] = a[t % 4] + in[t];", ("t % 4", "t % 5"), lambda x: x + 2, UNDEFINED),
    Bug("stack", "volatile char room[1000];\nroom[0] = t;\nout[t] = in[t];", ("1000", "129000"), same, BOUNDS),
    # alignment, arithmetic
    Bug("misaligned_load", PACKS, ("(in + 4 * t)", "(in + 4 * t - (t == 31))"), same, UNDEFINED, threads=32),
    Bug("misaligned_store", PACKS, ("(out + 4 * t)", "(out + 4 * t - (t == 31))"), same, UNDEFINED, threads=32),
    Bug("overflow", "out[t] = in[t] + 0 * float(n + 2147483000);", ("2147483000", "2147483647"), same, UNDEFINED),
    Bug("shift", "out[t] = in[t] + (1 << n % 32);", ("n % 32", "n"), lambda x: x + 1, UNDEFINED),
    Bug("division", "out[t] = in[t] + 1 / (n - t + 1);", ("t + 1", "t - 1"), same, UNDEFINED),
    # blocks and clusters
    Bug(
        "order_of_blocks", "const int i = blockIdx.x * 32 + t;\nout[i] = blockIdx.x ? in[i] + in[i - 32] : in[i];",
        ("in[i - 32]", "out[i - 32]"), lambda x: x + np.r_[np.zeros(32), x[:32]], threads=32, blocks=2, size=64,
    ),
    clusters("no_barrier_at_the_start", ("cluster_arrive();\ncluster_wait();\nif", "if"), "has not started"),
    clusters("no_barrier_before_reading", (f"{ARRIVE}\ncluster_wait();", "")),
    clusters("no_wait", (f"{ARRIVE}\ncluster_wait();", ARRIVE), f"second arrival|{ENDED}"),
    clusters("two_arrivals", ("cluster_arrive();\n", "cluster_arrive();\ncluster_arrive();\n"), "second arrival"),
    clusters("wait_alone", (ARRIVE, ""), "without an arrival"),
    clusters("no_wait_at_the_end", ("cluster_wait();  // nobody", "// nobody"), "ends without a wait|has ended before"),
    clusters("arrival_of_some_threads", (ARRIVE, f"if (t != 9) {ARRIVE}"), "without an arrival"),
    clusters("barrier_for_some_blocks", (f"{ARRIVE}\n", "if (rank) cluster_arrive(), "), "others have arrived|an arrival"),
    clusters("two_lines_of_the_cluster", (ARRIVE, f"if (rank == 1) cluster_arrive(); else\n{ARRIVE}"), "others have arrived"),
    clusters("no_such_block", ("rank, t, in", "rank, t + 1, in"), "not in the cluster"),
    clusters("put_after", ("s + rank", "s + rank + 1"), "not an address in shared memory"),
    clusters("put_elsewhere", ("s + rank", "out + rank"), "not an address in shared memory"),
    clusters("put_to_the_dead", ("cluster_arrive();  // the end\ncluster_wait();", "put(s, 3 - rank, 0.0f);"), "has ended"),
]  # fmt: skip
BY_NAME = {b.name: b for b in BUGS}


@cache
def unit() -> str:
    """All of them in one translation unit."""
    return "\n".join(b.kernel(wrong) for b in BUGS for wrong in (False, True))


@pytest.fixture(params=BUGS, ids=lambda b: b.name)
def bug(request: pytest.FixtureRequest) -> Bug:
    return request.param


@pytest.mark.parametrize("seed", SEEDS)
def test_right(bug: Bug, seed: int) -> None:
    """The right version, in every order."""
    x = np.arange(1, bug.size + 1, dtype=np.float32)
    np.testing.assert_array_equal(bug.run(False, seed), np.asarray(bug.want(x), np.float32))


def test_planted(bug: Bug) -> None:
    """The wrong version is caught in some order, and leaves nothing behind that would trouble the next launch."""
    x = np.arange(1, bug.size + 1, dtype=np.float32)
    want = np.asarray(bug.want(x), np.float32)
    errors, wrong = [], 0
    for seed in SEEDS:
        try:
            wrong += not np.array_equal(bug.run(True, seed), want)
        except host.HostError as error:
            errors.append(str(error))
        np.testing.assert_array_equal(bug.run(False, seed), want)
    if bug.caught is None:
        assert errors == []
        assert wrong
    else:
        assert errors
        for error in errors:
            assert re.search(bug.caught, error), error
            assert error.startswith(f"{bug.name}_wrong: ")


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("no_barrier", {"shared": 400}, "out of bounds"),
        ("no_barrier", {"shared": 508}, "a write next to shared memory"),
        ("no_barrier", {"shared": 0}, "out of bounds"),
        ("no_barrier", {"shared": 232449}, "more shared memory than a block may have: 232449"),
        ("no_barrier", {"threads": 160}, "160 threads, bound to 128"),
        ("no_barrier", {"threads": 0}, "a block of 0 threads"),
        ("no_barrier", {"blocks": (0, 1)}, "a grid of 0 x 1"),
        ("no_barrier", {"blocks": (1, 0)}, "a grid of 1 x 0"),
        ("no_barrier", {"blocks": (1, 65536)}, "a grid of 1 x 65536"),
        ("shuffle_width", {"threads": 48}, "deadlock|ends while"),
        ("no_barrier_at_the_start", {"blocks": 6}, "the grid is not a multiple of the cluster"),
        ("no_barrier_at_the_start", {"shared": 12}, "not an address in shared memory"),
    ],
)
def test_launched_wrongly(name: str, changed: dict[str, Any], message: str) -> None:
    for seed in SEEDS:
        with pytest.raises(host.HostError, match=message):
            BY_NAME[name].run(False, seed, **changed)


def test_limits_of_the_device() -> None:
    """What an H100 allows is too much for another device."""
    kernel = BY_NAME["no_barrier"]
    np.testing.assert_array_equal(kernel.run(False, 0, shared=232448), np.arange(128, 0, -1))
    old = host.Host(Device(80, 108, 166912))
    x = np.zeros(256, np.float32)
    arguments = x, x, ctypes.c_int(256)
    launch(unit(), "no_barrier_right", *arguments, shared=166912, on=old)
    with pytest.raises(host.HostError, match="more shared memory than a block may have"):
        launch(unit(), "no_barrier_right", *arguments, shared=166913, on=old)
    with pytest.raises(host.HostError, match="a cluster of blocks, which a device of capability 80 has not"):
        launch(unit(), "no_such_block_right", *arguments, blocks=8, threads=32, shared=16, on=old)


@pytest.mark.parametrize("threads", [32, 96, 160, 320, 352, 1024])
@pytest.mark.parametrize("seed", range(8))
def test_every_warp_has_its_turn(threads: int, seed: int) -> None:
    """Whatever their number, in every order."""
    text = f"""extern "C" __global__ void __launch_bounds__(1024)
turns(float* out, int n) {{
{SHARED}
const int t = threadIdx.x;
float v = t;
for (int k = 0; k < 5; ++k) {{
  s[t] = v;
  __syncthreads();
  v = s[(t + 32) % n];
  __syncthreads();
}}
out[t] = v;
}}
"""
    out = np.zeros(threads, np.float32)
    launch(text, "turns", out, ctypes.c_int(threads), threads=threads, shared=4 * threads, on=host.Host(seed=seed))
    np.testing.assert_array_equal(out, (np.arange(threads) + 160) % threads)


# --- what a launch leaves behind ----------------------------------------------------------------------------------------------


def process_state() -> list[bytes]:
    """The handlers of signals (as glibc has them), the stack that they run on, and whether subnormal numbers are kept."""
    libc = ctypes.CDLL(None)
    states = []
    for number in range(1, 32):
        room = ctypes.create_string_buffer(256)
        libc.sigaction(number, None, room)
        states.append(room.raw[:16] + room.raw[136:140])  # the handler, what it blocks, its flags
    room = ctypes.create_string_buffer(64)
    assert libc.sigaltstack(None, room) == 0
    return [*states, room.raw, (np.full(64, 1e-40, np.float32) * np.float32(1)).tobytes()]


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("name", ["read_after", "overflow", "deadlock", "no_such_block", "stack"])
def test_handlers_are_put_back(name: str, wrong: bool) -> None:
    """pytest's faulthandler among them; after an error too."""
    host.runtime()
    before, enabled = process_state(), faulthandler.is_enabled()
    try:
        BY_NAME[name].run(wrong, 0)
    except host.HostError:
        assert wrong
    assert process_state() == before
    assert faulthandler.is_enabled() is enabled


def test_threads_take_turns() -> None:
    """Launches from several threads at once, right and wrong ones, do not touch one another."""
    names = ["no_barrier_before_reuse", "read_after", "no_barrier_at_the_start", "deadlock", "shuffle_width", "misaligned_load"]
    unit()
    start, found = threading.Barrier(4), []

    def run(number: int) -> None:
        start.wait()
        for k in range(3 * len(names)):
            bug, seed = BY_NAME[names[(k + number) % len(names)]], k % 4
            x = np.arange(1, bug.size + 1, dtype=np.float32)
            right = np.array_equal(bug.run(False, seed), np.asarray(bug.want(x), np.float32))
            try:
                caught = not np.array_equal(bug.run(True, seed), np.asarray(bug.want(x), np.float32))
            except host.HostError as error:
                caught = bug.caught is not None and re.search(f"{bug.name}_wrong: .*({bug.caught})", str(error)) is not None
            found.append(right and (caught or bug.caught is None))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 4 * 3 * len(names)
    assert all(found)


def test_signals_elsewhere(python: Callable[..., str]) -> None:
    """One that another thread gets during a launch is not taken for the kernel's: it goes to whom it went before."""
    code = """
        import signal, threading, numpy as np
        from cuda_helpers import launch

        text = 'extern "C" __global__ void spin(volatile float* a) { a[0] = 1; while (!a[1]); a[2] = 3; }'
        a, seen = np.zeros(3, np.float32), []
        signal.signal(signal.SIGFPE, lambda number, frame: seen.append(number))
        thread = threading.Thread(target=launch, args=(text, "spin", a), kwargs={"threads": 32})
        thread.start()
        while a[0] == 0:
            assert thread.is_alive()
        signal.pthread_kill(threading.get_ident(), signal.SIGFPE)
        a[1] = 2
        thread.join()
        print(*seen, *a)
    """
    assert python(code, PYTHONPATH=str(Path(__file__).parent)) == f"{signal.SIGFPE} 1.0 2.0 3.0\n"


# --- conversions --------------------------------------------------------------------------------------------------------------

HALVES = {
    "float16": ("__half", "__half2float", "__float2half_rn"),
    "bfloat16": ("__nv_bfloat16", "__bfloat162float", "__float2bfloat16_rn"),
}
FLUSHED = "using real = float;\n"  # such a source is compiled with -ftz=true by CuPy, and the host does the same


@pytest.fixture(params=HALVES)
def half(request: pytest.FixtureRequest) -> Any:
    if request.param == "float16":
        return np.dtype(np.float16)
    return np.dtype(pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: bfloat16 not compared").bfloat16)


@pytest.fixture(params=["", FLUSHED], ids=["kept", "flushed"])
def text(request: pytest.FixtureRequest) -> str:
    """Conversions as kernels, and products by one, which flush subnormal numbers if anything does."""
    loop = "for (int i = threadIdx.x; i < n; i += 256) out[i] ="
    head = 'extern "C" __global__ void __launch_bounds__(256)\n'
    lines = [request.param, "#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n"]
    for name, (kind, widen, narrow) in HALVES.items():
        product = f"{narrow}({widen}(in[i]) * by)"
        lines += [
            f"{head}widen_{name}(float* out, const {kind}* in, int n) {{ {loop} {widen}(in[i]); }}\n",
            f"{head}narrow_{name}({kind}* out, const float* in, int n) {{ {loop} {narrow}(in[i]); }}\n",
            f"{head}times_{name}({kind}* out, const {kind}* in, float by, int n) {{ {loop} {product}; }}\n",
        ]
    return "".join(lines)


def patterns(half: Any) -> np.ndarray:
    return np.arange(65536, dtype=np.uint16).view(half)


def test_every_half(half: Any, text: str) -> None:
    """All 65,536 patterns; subnormal ones too, flushed or not: a conversion is no arithmetic."""
    x, out = patterns(half), np.zeros(65536, np.float32)
    launch(text, f"widen_{half.name}", out, x, ctypes.c_int(x.size), threads=256)
    with np.errstate(invalid="ignore"):
        want = x.astype(np.float32)
    nan = np.isnan(want)
    assert nan.sum() == {"float16": 2 * 1023, "bfloat16": 2 * 127}[half.name]
    assert np.isnan(out[nan]).all()
    np.testing.assert_array_equal(out[~nan].view(np.uint32), want[~nan].view(np.uint32))


def test_every_tie(half: Any, text: str) -> None:
    """Midpoints between adjacent halves go to the even one, their neighbours to the nearer one; overflow, infinities, NaN."""
    finite = patterns(half)[:32768]
    finite = finite[np.isfinite(finite.astype(np.float32))].astype(np.float64)  # 0 and up, in order
    assert (np.diff(finite) > 0).all()
    ties = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    assert (ties == (finite[1:] + finite[:-1]) / 2).all()
    edge = np.float32(finite[-1] + (finite[-1] - finite[-2]) / 2)  # where infinity begins
    high, low = np.float32(np.inf), np.float32(0)
    near = [np.nextafter(a, to) for a in (ties, finite.astype(np.float32)[1:]) for to in (high, low)]
    edges = [edge, np.nextafter(edge, low), np.nextafter(edge, high), np.finfo(np.float32).max, high, low]
    tiny = [np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).smallest_normal]
    x = np.concatenate([ties, finite.astype(np.float32), *near, np.array([*edges, *tiny], np.float32)])
    x = np.concatenate([x, -x])
    out = np.zeros(x.size, half)
    launch(text, f"narrow_{half.name}", out, x, ctypes.c_int(x.size), threads=256)
    with np.errstate(over="ignore", under="ignore"):
        want = x.astype(half)
    np.testing.assert_array_equal(out.view(np.uint16), want.view(np.uint16))
    assert np.isinf(out.astype(np.float32)).sum() == 8  # the edge, above it, the largest, infinity; of both signs
    ends = [np.float32(edge), np.nextafter(edge, low)]
    got = out[[np.flatnonzero(x == e)[0] for e in ends]].astype(np.float64)
    assert got.tolist() == [np.inf, finite[-1]]


def test_nan_is_one_half(half: Any, text: str) -> None:
    """As on a GPU, whatever its sign and bits."""
    bits = [0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFC00000, 0xFFFFFFFF, 0x7F802000]
    x = np.array(bits, np.uint32).view(np.float32)
    out = np.zeros(x.size, half)
    launch(text, f"narrow_{half.name}", out, x, ctypes.c_int(x.size), threads=256)
    assert set(out.view(np.uint16).tolist()) == {0x7FFF}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only this processor's flush is switched on")
def test_arithmetic_flushes(half: Any, text: str) -> None:
    """A subnormal bfloat16 is a subnormal float32, which arithmetic takes for zero of its sign in a source that computes in
    float32; a product that is too small becomes zero. A subnormal float16 is a normal float32. All are kept elsewhere.
    """
    x = patterns(half)
    x = x[np.isfinite(x.astype(np.float32))]
    subnormal = (x.view(np.uint16) & 0x7FFF) < 1 << {"float16": 10, "bfloat16": 7}[half.name]
    out = np.ones(x.size, half)
    launch(text, f"times_{half.name}", out, x, ctypes.c_float(1), ctypes.c_int(x.size), threads=256)
    flushes = text.startswith(FLUSHED)
    lost = subnormal if flushes and half.name == "bfloat16" else np.zeros_like(subnormal)
    np.testing.assert_array_equal(out.view(np.uint16), np.where(lost, x.view(np.uint16) & 0x8000, x.view(np.uint16)))
    least = np.array([np.finfo(np.float32).smallest_normal], np.float32)
    if half.name == "bfloat16":
        launch(text, "times_bfloat16", out, least.astype(half), ctypes.c_float(0.5), ctypes.c_int(1), threads=256)
        assert out[0] == (0 if flushes else least[0] / 2)


# --- emitted kernels: orders --------------------------------------------------------------------------------------------------

ONE = Device(processors=1)  # so few that no row is shared out over launches
OLD = Device(80, 1)  # without clusters
CALLS: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "softmax": lambda x, w, b, target: [xpnn.softmax(x)],
    "softmax_backward": lambda x, w, b, target: xpnn.softmax.vjp(x)[1](w),
    "cross_entropy": lambda x, w, b, target: xpnn.cross_entropy.value_and_grad(x, target),
    "relu": lambda x, w, b, target: [xpnn.relu(x), *xpnn.relu.vjp(x)[1](w)],
    "linear": lambda x, w, b, target: (lambda y, pullback: [y, *pullback(y)])(*xpnn.linear.vjp(x, w, b, activation=xpnn.relu)),
}


def arrays(shape: tuple[int, int], dtype: str) -> list[np.ndarray]:
    """What those calls take."""
    rng = np.random.default_rng(sum(shape))
    x, w = (rng.normal(size=shape).astype(dtype) for _ in range(2))
    return [x, w, rng.normal(size=shape[0]).astype(dtype), rng.integers(0, shape[1], shape[0])]


@pytest.mark.parametrize(
    ("call", "dtype", "shape", "device", "regime"),
    [
        ("softmax", "float32", (133, 7), None, "thread"),
        ("softmax", "float32", (11, 64), None, "warp"),
        ("softmax", "float32", (5, 1001), None, "warp"),
        ("softmax", "float32", (2, 5000), None, "block"),
        ("softmax", "float32", (2, 20001), ONE, "cluster"),
        ("softmax", "float32", (1, 140000), ONE, "cluster"),
        ("softmax", "float32", (2, 20001), OLD, "shared"),
        ("softmax", "float32", (2, 60001), OLD, "passes"),
        ("softmax", "float32", (1, 40001), None, "split"),
        ("softmax_backward", "float64", (3, 9001), ONE, "cluster"),
        ("softmax_backward", "float64", (2, 30000), OLD, "passes"),
        ("softmax_backward", "float64", (20, 31), None, "warp"),
        ("cross_entropy", "float16", (70, 6), None, "thread"),
        ("cross_entropy", "float16", (3, 5003), None, "block"),
        ("cross_entropy", "float16", (2, 40008), ONE, "cluster"),
        ("cross_entropy", "float16", (2, 30001), OLD, "shared"),
        ("cross_entropy", "float16", (1, 40001), None, "split"),
        ("linear", "float32", (300, 5), None, "columns"),
        ("relu", "float16", (3, 1501), None, "split"),
    ],
)  # fmt: skip
def test_orders(call: str, dtype: str, shape: tuple[int, int], device: Device | None, regime: str, close: Any) -> None:
    """Emitted kernels give the same bits in every order of warps and blocks, and the formula's values."""
    values = arrays(shape, dtype)
    found = []
    for seed in SEEDS:
        with host.running(host.Host(device, seed)) as used:
            results = CALLS[call](*map(host.as_cupy, values))
            found.append([host.as_numpy(y).copy() for y in results])
        assert regime in used.launched
    for results in found[1:]:
        for y, first in zip(results, found[0], strict=True):
            assert y.tobytes() == first.tobytes()
    with xpnn.use_backend("numpy"):
        want = CALLS[call](*(v.astype(np.float64) if v.dtype.kind == "f" else v for v in values))
    for y, correct in zip(found[0], want, strict=True):
        close(y, correct, ulps=256, dtype=y.dtype)


# --- emitted kernels: sanitizers ----------------------------------------------------------------------------------------------

SANITIZED = """
    import ctypes, os
    for name in ("LD_PRELOAD", "ASAN_OPTIONS"):
        os.environ.pop(name)  # the compiler takes its time with them
    import numpy as np
    from xpnn.backends.cupy import host

    FLAGS = (
        "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
        "-fno-sanitize=float-divide-by-zero,float-cast-overflow,vptr", "-g", "-O0",
    )
    libc = ctypes.CDLL(None)
    libc.free.argtypes = [ctypes.c_void_p]

    class Room:
        "Memory of just this size, whose ends the sanitizer knows."

        def __init__(self, size):
            at = ctypes.c_void_p()
            assert libc.posix_memalign(ctypes.byref(at), 256, size) == 0
            self.at = at.value
            ctypes.memset(self.at, 0xff, size)

        def __del__(self):
            libc.free(self.at)
"""
EMITTED = """
    import cupy, xpnn
    from xpnn.backends.cupy.regime import Device

    ONE, OLD = Device(processors=1), Device(80, 1)  # no row is shared out over launches; no clusters either

    def allocate(size):
        room = Room(size)
        return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(room.at, size, room, device_id=0), 0)

    rng = np.random.default_rng(0)

    def array(shape, dtype, offset):
        "offset: elements before the array in its memory, and as many between its rows"
        rows, columns = shape
        gap = offset if rows > 1 and offset > 1 else 0
        a = cupy.empty(offset + (columns + gap) * rows - gap, dtype)[offset:]
        a = cupy.lib.stride_tricks.as_strided(a, shape, ((columns + gap) * a.itemsize, a.itemsize))
        host.as_numpy(a)[...] = rng.normal(size=shape)
        return a

    def softmax(shape, dtype, offset):
        xpnn.softmax(array(shape, dtype, offset), out=array(shape, dtype, offset))

    def cross_entropy(shape, dtype, offset):
        target = host.as_cupy(rng.integers(0, shape[1], shape[0]))
        xpnn.cross_entropy.value_and_grad(array(shape, dtype, offset), target)

    def relu(shape, dtype, offset):
        xpnn.relu(array(shape, dtype, offset))

    def linear(shape, dtype, offset):
        bias = array((1, shape[1]), dtype, offset)[0]
        y, pullback = xpnn.linear.vjp(array(shape, dtype, offset), array((shape[1], shape[1]), dtype, 0), bias)
        pullback(array(shape, dtype, offset))

    CASES = [
        (softmax, (3, 7), "float32", 0), (softmax, (3, 7), "float16", 1), (softmax, (5, 1000), "float32", 0),
        (softmax, (5, 1000), "float16", 1), (softmax, (5, 1000), "float32", 3), (softmax, (2, 5000), "float32", 1),
        (softmax, (2, 5000), "float16", 0), (softmax, (1, 40001), "float32", 1), (softmax, (1, 40001), "float16", 0),
        (cross_entropy, (3, 7), "float32", 0), (cross_entropy, (5, 1000), "float16", 0),
        (cross_entropy, (2, 5000), "float32", 0), (cross_entropy, (1, 40001), "float16", 1),
        (relu, (3, 7), "float16", 1), (relu, (1, 40001), "float32", 1), (relu, (2, 5000), "float16", 0),
        (linear, (3, 7), "float32", 1), (linear, (5, 100), "float16", 0),
        (softmax, (2, 20001), "float32", 1, ONE), (cross_entropy, (2, 20000), "float16", 0, ONE),
        (softmax, (2, 20001), "float16", 1, OLD), (cross_entropy, (2, 20000), "float32", 0, OLD),
        (softmax, (2, 60001), "float32", 1, OLD), (cross_entropy, (1, 120000), "float16", 0, OLD),
    ]
    for seed, (call, shape, dtype, offset, *device) in enumerate(CASES):
        with host.running(host.Host(*device or [None], seed % 4, FLAGS, guard=False)) as used:
            cupy.cuda.set_allocator(allocate)
            call(shape, dtype, offset)
            print(call.__name__, shape, dtype, offset, *used.launched)
"""
WRONG = """
    TEXT = '''extern "C" __global__ void __launch_bounds__(32)
    wrong(float* a, int n, int m) {{
      {memory}
      reinterpret_cast<float*>(memory)[threadIdx.x % n] = a[threadIdx.x % m];
    }}
    '''
    a = Room(5 * 4)
    held = ctypes.c_void_p(a.at), ctypes.c_int({n}), ctypes.c_int({m})
    addresses = (ctypes.c_void_p * 3)(*map(ctypes.addressof, held))
    machine = host.Host(flags=FLAGS, guard=False)
    machine.function(host.load(TEXT, FLAGS), TEXT, "wrong")((1, 1), 32, 20, ctypes.addressof(addresses))
    print("nothing found")
"""


@pytest.fixture
def sanitized(python: Callable[..., str]) -> Callable[..., str]:
    """Run code in a process with the address sanitizer."""
    cxx = host.compiler()
    assert cxx is not None
    found = []
    for name in ("libasan.so", "libstdc++.so"):
        shown = subprocess.run([cxx, f"-print-file-name={name}"], capture_output=True, text=True, check=False).stdout.strip()
        if not Path(shown).is_absolute():
            pytest.skip(f"{cxx} has no {name}: kernels are not run with the address sanitizer")
        found.append(shown)

    def run(code: str, fails: bool = False) -> str:
        options = "detect_leaks=0:detect_stack_use_after_return=0"
        return python(SANITIZED + code, fails=fails, LD_PRELOAD=" ".join(found), ASAN_OPTIONS=options)

    return run


def test_sanitizers(sanitized: Callable[..., str]) -> None:
    """Emitted kernels, over arrays whose ends the address sanitizer knows."""
    printed = sanitized(EMITTED).splitlines()
    assert len(printed) == 24
    regimes = {"thread", "warp", "block", "cluster", "shared", "passes", "split", "columns", "values"}
    assert {word for line in printed for word in line.split()} >= regimes


@pytest.mark.parametrize(
    ("n", "m", "report"),
    [
        (5, 6, "AddressSanitizer: heap-buffer-overflow"),
        (6, 5, "AddressSanitizer: use-after-poison"),
        (5, 0, "runtime error: division by zero"),
    ],
)  # fmt: skip
def test_sanitizers_find(sanitized: Callable[..., str], n: int, m: int, report: str) -> None:
    """An array read past its end, shared memory written past its end, undefined behaviour; and nothing where nothing is."""
    assert report in sanitized(WRONG.format(memory=MEMORY, n=n, m=m), fails=True)
    assert sanitized(WRONG.format(memory=MEMORY, n=5, m=5)) == "nothing found\n"
