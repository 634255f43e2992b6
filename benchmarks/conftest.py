"""Options of `pytest benchmarks`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("xpnn benchmarks")
    group.addoption("--bench-full", action="store_true", help="all cases instead of the quick ones")
    group.addoption("--bench-peers", action="store_true", help="PyTorch and JAX too, where installed")
