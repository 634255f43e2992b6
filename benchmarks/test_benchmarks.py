"""The cases of `xpnn bench` under pytest-benchmark: a group for each case, in it a benchmark for each contender.

`--bench-full` takes all cases, `--bench-peers` other libraries too.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from xpnn.backends.kernel import registry
from xpnn.benchmarks import peers
from xpnn.benchmarks.cases import Case, cases
from xpnn.benchmarks.timing import Contender

pytest.importorskip("pytest_benchmark")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--bench-full", default=False)
    others = peers.PEERS if metafunc.config.getoption("--bench-peers", default=False) else ()
    found = cases((k for k in registry.values() if k.__module__.startswith("xpnn.")), quick=not full)
    pairs = [(case, name, others) for case in found for name in (peers.OURS, peers.COMPOSED, *others)]
    metafunc.parametrize(("case", "name", "others"), pairs, ids=[f"{case.name}, {name}" for case, name, _ in pairs])


@functools.lru_cache(maxsize=1)  # the contenders of a case follow one another
def contenders(case: Case, others: tuple[str, ...]) -> tuple[dict[str, Contender], dict[str, float], list[str]]:
    return peers.contenders(case, case.arrays(), others)


@pytest.mark.benchmark(max_time=0.2, min_rounds=3, warmup=False)
def test_case(case: Case, name: str, others: tuple[str, ...], benchmark: Any) -> None:
    found, _, notes = contenders(case, others)
    if name not in found:
        pytest.skip(next((note for note in notes if name in note), f"{name} has no function for it"))
    benchmark.group = case.name
    benchmark.extra_info.update(bytes=case.bytes, source=case.source)
    with found[name].scope():
        benchmark(found[name].call)
