"""Runs a program's matrix products and fused loops in order; what differs between backends is passed in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from xpnn.backends.program import Product, Program, steps
from xpnn.backends.task import Executable


class CompiledLoop(Protocol):
    """A fused loop. `unsafe` holds the pairs (output, input) that must not share memory."""

    program: Program

    @property
    def unsafe(self) -> Collection[tuple[str, str]]: ...

    def __call__(self, arrays: Mapping[str, Any], numbers: Mapping[str, Any], out: Mapping[str, Any]) -> dict[str, Any]: ...


def executable(
    program: Program,
    compile_loop: Callable[[Program], CompiledLoop],
    matmul: Callable[..., Any],
    share: Callable[[Any, Any], bool],
) -> Executable:
    """A callable that runs a whole program.

    Parameters
    ----------
    matmul
        As NumPy's, with `out=`.
    share
        Whether two arrays may share memory.
    """
    plan = [step if isinstance(step, Product) else compile_loop(step.program) for step in steps(program)]

    if len(plan) == 1 and not isinstance(plan[0], Product):
        only = plan[0]

        def single(xp: Any, arrays: Any, numbers: Any, out: Any) -> Any:
            return only(arrays, program.numbers(numbers), out)

        single.compiled = only  # type: ignore[attr-defined]
        single.takes_planes = getattr(only, "takes_planes", False)  # type: ignore[attr-defined]
        return single

    homes = _homes(program, plan)

    def execute(xp: Any, arrays: Any, numbers: Any, out: Any) -> Any:
        known, numbers = dict(arrays), program.numbers(numbers)
        # a product may read an input after a result was written: results never go straight over inputs here
        out = {n: o for n, o in out.items() if not any(share(o, a) for a in arrays.values())}
        for step in plan:
            if isinstance(step, Product):
                left = known[step.left].T if step.transpose[0] else known[step.left]
                right = known[step.right].T if step.transpose[1] else known[step.right]
                target = out.get(homes.get(step.result, step.result))
                clashes = target is not None and any(share(target, a) for a in (left, right))
                usable = target is not None and target.dtype == left.dtype and target.flags.c_contiguous and not clashes
                known[step.result] = matmul(left, right, out=target) if usable else matmul(left, right)
            else:
                given = {n: known[n] for n in step.program.inputs}
                here = {n: known.get(home, out.get(n)) for n, home in _targets(step, homes).items()}
                known |= step(given, numbers, {n: a for n, a in here.items() if a is not None})
        return {n: known[n] for n in program.outputs}

    return execute


def _targets(step: CompiledLoop, homes: Mapping[str, str]) -> dict[str, str]:
    """For each output of a loop, the product whose memory it takes over (or a name that nothing has)."""
    taken = {home: temporary for temporary, home in homes.items() if temporary in step.program.inputs}
    return {n: taken.get(n, "") for n in step.program.outputs}


def _homes(program: Program, plan: list[Any]) -> dict[str, str]:
    """Products that only one loop reads, and the output of that loop that is written over them."""
    homes: dict[str, str] = {}
    for step in plan:
        if not isinstance(step, Product) or step.result in program.outputs:
            continue
        readers = [s for s in plan if not isinstance(s, Product) and step.result in s.program.inputs]
        also = [s for s in plan if isinstance(s, Product) and step.result in (s.left, s.right)]
        if len(readers) != 1 or also:
            continue
        reader = readers[0].program
        for name, node in reader.outputs.items():
            fits = node.shape == reader.inputs[step.result].shape and name in program.outputs
            if fits and (name, step.result) not in readers[0].unsafe and name not in homes.values():
                homes[step.result] = name
                break
    return homes
