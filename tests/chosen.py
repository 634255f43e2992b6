"""Which variants of a kernel a test goes through, where all of them would take too long."""

from xpnn.backends.kernel import Kernel
from xpnn.testing import Variant, variants


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
