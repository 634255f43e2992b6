"""Every CUDA kernel goes through NVIDIA's compiler: it compiles, nothing spills, registers are bounded, loads are wide."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from chosen import few

import xpnn
from xpnn.backends.cupy import inspect
from xpnn.backends.cupy.emit import Emitted
from xpnn.backends.cupy.regime import Device
from xpnn.backends.kernel import Kernel
from xpnn.backends.prepare import cuda
from xpnn.testing import Variant, variants

pytestmark = pytest.mark.skipif(not inspect.available(), reason="CuPy, which brings NVIDIA's compiler, is not installed")

FOUND = dict.fromkeys(k for n in xpnn.kernels.__all__ if isinstance(k := getattr(xpnn, n), Kernel))
KERNELS = [k for k in FOUND if k.declaration.driver is None]  # a driver runs other kernels than its own program
DTYPES = ("float16", "bfloat16", "float32", "float64")
H100, A100 = Device(), Device(80, 108, 166912)
# a shape for every regime, with rows on 16-byte borders and not
SHAPES: list[tuple[Device, tuple[int, int]]] = [
    (H100, (4000, 10)),
    (H100, (4000, 512)),
    (H100, (4000, 4096)),
    (H100, (4000, 4099)),
    (H100, (4000, 50257)),
    (H100, (4000, 128256)),
    (H100, (2, 200_000)),
    (A100, (4000, 36864)),
    (A100, (4000, 400_000)),
]
# registers that a thread may take at most on sm_90, which the launches are chosen for; elsewhere as many as a block can have
CEILING = {
    "thread": 128, "warp": 208, "block": 224, "cluster": 248, "shared": 192, "passes": 224, "split": 248, "columns": 128,
    "values": 128,
}  # fmt: skip
OLDER = [(75, Device(75, 40, 65536)), (80, A100), (100, Device(100, 148, 232448))]

Record = Callable[[str, object], None]


def emitted(
    kernel: Kernel, variant: Variant, direction: str, dtype: str, shape: tuple[int, int], device: Device
) -> list[Emitted]:
    options: dict[str, Any] = dict(variant.options) | dict.fromkeys(variant.optional, 1) | dict.fromkeys(variant.full, "float")
    return [part for part in cuda(kernel, dtype, direction, shape, options, device) if isinstance(part, Emitted)]


def directions(kernel: Kernel, variant: Variant) -> list[str]:
    found = ["forward"] + ["backward"] * (kernel.declaration.backward is not None)
    reduces = "reduction" in kernel.declaration.options and dict(variant.options).get("reduction") != "none"
    return found + ["value_and_grad"] * reduces


def check(part: Emitted, capability: int, record: Record) -> None:
    compiled = inspect.compile_for(part.text, capability)
    for launch in part.launches:
        name, regime = launch.function, launch.regime.name
        assert compiled.spills[name] == 0, (name, regime)
        if capability == 90:
            assert compiled.registers[name] <= CEILING[regime], (name, regime, compiled.registers[name])
        assert compiled.registers[name] * launch.threads <= 65536
        record("cuda compiled", f"{part.program.name} {part.dtype} {regime} sm_{capability}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.__name__)
def test_every_regime_compiles(kernel: Kernel, dtype: str, record_property: Record) -> None:
    """For sm_90 (sm_80 where that alone has the regime): every direction, alignment and set of options.

    In float64 two variants only, in half precision one: it computes in float32 too, and is but stored otherwise.
    `make cuda-all` goes through all of them.
    """
    seen = set()
    left = {"float32": -1, "float64": 2}.get(dtype, 1)
    for variant in few(kernel, together=dtype == "float32"):
        before = len(seen)
        for direction in directions(kernel, variant):
            for device, shape in SHAPES:
                for part in emitted(kernel, variant, direction, dtype, shape, device):
                    if part.text not in seen:
                        seen.add(part.text)
                        check(part, device.capability, record_property)
        left -= len(seen) > before  # a variant of linear is its product alone
        if not left:
            break
    assert seen


@pytest.mark.parametrize(("capability", "device"), OLDER)
@pytest.mark.parametrize("name", ["softmax", "cross_entropy", "linear"])
def test_other_architectures(name: str, capability: int, device: Device, record_property: Record) -> None:
    kernel = getattr(xpnn, name)
    variant = next(iter(variants(kernel)))
    for dtype in ("bfloat16", "float32"):
        for direction in directions(kernel, variant)[1:]:
            for shape in ((4000, 10), (4000, 4096), (4000, 50257), (2, 200_000)):
                for part in emitted(kernel, variant, direction, dtype, shape, device):
                    check(part, capability, record_property)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "device"), OLDER)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.__name__)
def test_all_of_it_on_other_architectures(
    kernel: Kernel, dtype: str, capability: int, device: Device, record_property: Record
) -> None:
    seen = set()
    for variant in variants(kernel):
        for direction in directions(kernel, variant):
            for _, shape in SHAPES:
                for part in emitted(kernel, variant, direction, dtype, shape, device):
                    if part.text not in seen:
                        seen.add(part.text)
                        check(part, capability, record_property)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "direction", "shape"),
    [
        ("relu", "forward", (1, 1_000_000)),
        ("softmax", "forward", (4000, 1024)),
        ("softmax", "forward", (4000, 4096)),
        ("softmax", "backward", (4000, 4096)),
        ("softmax", "forward", (4000, 50257)),
        ("cross_entropy", "value_and_grad", (4000, 128256)),
        ("linear", "backward", (4000, 1024)),
    ],
)
def test_loads_and_stores_are_wide(name: str, direction: str, shape: tuple[int, int], dtype: str) -> None:
    """Sixteen bytes at a time; also rows that start anywhere come and go so."""
    kernel = getattr(xpnn, name)
    variant = list(variants(kernel))[-1] if name == "linear" else next(iter(variants(kernel)))
    try:
        code = [
            function
            for part in emitted(kernel, variant, direction, dtype, shape, H100)
            for function in inspect.compile_for(part.text, 90).instructions().split("Function : ")[1:]
            if any(function.startswith(x.function) and x.regime.name != "values" for x in part.launches)
            and "_end" not in function.split()[0]
        ]
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert code
    for function in code:
        assert re.search(r"LDG\.E\.128", function), function.split()[0]
        assert re.search(r"STG\.E\.128", function), function.split()[0]


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "cross_entropy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_the_least_where_a_row_fits_on_chip(name: str, dtype: str) -> None:
    """Each full array is read once and written once; what else moves is one number a row."""
    kernel = getattr(xpnn, name)
    variant = next(iter(variants(kernel)))
    direction = "value_and_grad" if name == "cross_entropy" else "forward"
    size = {"float64": 8, "float32": 4}.get(dtype, 2)
    for rows, columns in ((4000, 1000), (4000, 8192), (4000, 50257), (4000, 128256)):
        (part,) = emitted(kernel, variant, direction, dtype, (rows, columns), H100)
        assert all(x.regime.name in ("thread", "warp", "block", "cluster", "values") for x in part.launches)
        read, written = (sum(x.moves[k] for x in part.launches) for k in (0, 1))
        assert rows * columns * size <= read <= rows * (columns * size + 64)
        assert rows * columns * size <= written <= rows * (columns * size + 64)


def test_spilling_is_seen_and_mended() -> None:
    """A kernel that is given too few registers spills; the one that `source` gives does not."""
    text = xpnn.cross_entropy.source(backend="cupy", direction="value_and_grad", dtype="float32", shape=(4000, 4096))
    starved = re.sub(r"__launch_bounds__\((\d+), \d+\)", r"__launch_bounds__(\1, 16)", text)
    assert inspect.spilling(starved, 90)
    assert not inspect.spilling(text, 90)
