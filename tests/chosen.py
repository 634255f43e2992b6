"""Which variants of a kernel a test goes through, where all of them would take too long."""

from collections.abc import Iterable

from xpnn.backends.kernel import Kernel
from xpnn.backends.prepare import reach
from xpnn.testing import Variant, variants


def in_dtypes(kernels: Iterable[Kernel], everywhere: tuple[str, ...]) -> list[tuple[Kernel, str]]:
    """Each kernel in these dtypes; in all four those along rows, and two that are not.

    Half precision changes how arrays are read and written, which element-wise kernels have in common.
    """
    found = []
    for kernel in kernels:
        full = reach(kernel) == "row" or kernel.__name__ in ("gelu", "sgd")
        found += [(kernel, d) for d in ("float16", "bfloat16", "float32", "float64") if full or d in everywhere]
    return found


def few(kernel: Kernel, together: bool = False) -> list[Variant]:
    """Some of the variants, in which each value of an option occurs (or each set of them), and each way to pass an input."""
    d = kernel.declaration
    said = {
        v: {*(d.options | dict(v.options)).items(), *((n, n in v.optional, n in v.full) for n in d.inputs)}
        | ({v.options} if together else set())
        for v in variants(kernel)
    }
    missing, chosen = set[object]().union(*said.values()), list[Variant]()
    while missing:
        chosen.append(max(said, key=lambda v: len(said[v] & missing)))
        missing -= said[chosen[-1]]
    return chosen
