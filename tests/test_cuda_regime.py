"""The choice of a regime: a pure function, and a tree of sums that depends on a row's length and dtype alone."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xpnn.backends.cupy.regime import MOST_WARPS, REGISTERS, WHAT, Device, Name, choose, roomier, shared_bytes, tree

H100 = Device()
A100 = Device(80, 108, 166912)
T4 = Device(75, 40, 65536)
DEVICES = st.sampled_from([H100, A100, T4, Device(89, 128, 101376), Device(100, 148, 232448)])


@pytest.mark.parametrize(
    ("rows", "columns", "itemsize", "live", "device", "name"),
    [
        (10_000, 1, 4, 1, H100, "thread"),
        (10_000, 10, 4, 1, H100, "thread"),
        (10_000, 12, 4, 1, H100, "warp"),
        (10_000, 33, 4, 1, H100, "warp"),
        (10_000, 1024, 4, 1, H100, "warp"),
        (10_000, 1025, 4, 1, H100, "block"),
        (10_000, 1024, 2, 1, H100, "warp"),
        (10_000, 16384, 4, 1, H100, "block"),
        (10_000, 16388, 4, 1, H100, "cluster"),
        (10_000, 131072, 4, 1, H100, "cluster"),
        (10_000, 262144, 4, 1, H100, "cluster"),
        (10_000, 262144, 4, 2, H100, "passes"),
        (10_000, 16388, 4, 1, A100, "shared"),
        (10_000, 50257, 4, 1, A100, "passes"),
        (10_000, 8192, 8, 1, H100, "block"),
        (10_000, 40_000, 8, 1, H100, "cluster"),
        (4, 131072, 4, 1, H100, "split"),
        (1, 10**9, 4, 1, H100, "split"),
        (10_000, 50257, 4, 0, H100, "split"),
        (10_000, 50, 4, 0, H100, "warp"),
    ],
)
def test_choice(rows: int, columns: int, itemsize: int, live: int, device: Device, name: str) -> None:
    assert choose(rows, columns, itemsize, max(live, 1), live, False, device).name == name


def test_every_regime_is_described() -> None:
    assert WHAT.keys() == set(get_args(Name))


@given(
    rows=st.integers(1, 10**7),
    columns=st.integers(1, 2**21),
    itemsize=st.sampled_from([2, 4, 8]),
    inputs=st.integers(0, 6),
    live=st.integers(0, 6),
    staged=st.booleans(),
    device=DEVICES,
)
def test_what_every_choice_keeps(
    rows: int, columns: int, itemsize: int, inputs: int, live: int, staged: bool, device: Device
) -> None:
    """The tree is the row's own; blocks are within the hardware's limits; what is held fits."""
    r = choose(rows, columns, itemsize, inputs, live, staged, device)
    t = tree(columns, itemsize)
    assert r.tree == t
    assert t.lanes in (1, 2, 4, 8, 16, 32)
    assert t.width * itemsize == 16
    assert 1 <= r.warps <= MOST_WARPS
    chunks = -(-columns // t.chunk)
    if r.name in ("thread", "warp"):
        assert chunks == 1
    if r.name in ("block", "cluster"):
        assert r.warps * r.chunks * r.cluster >= chunks
        assert live <= 3
    assert r.cluster in (1, 2, 4, 8)
    assert r.cluster == 1 or device.clusters
    if r.name == "shared":
        assert shared_bytes(columns, itemsize, inputs, chunks, r.warps if staged else 0) <= device.shared
    assert r.threads * r.resident <= device.threads or r.resident == 1


@given(rows=st.integers(1, 10**6), columns=st.integers(1, 2**20), itemsize=st.sampled_from([2, 4, 8]), device=DEVICES)
def test_room_for_registers_grows_until_one_block_is_left(rows: int, columns: int, itemsize: int, device: Device) -> None:
    from dataclasses import replace

    r = choose(rows, columns, itemsize, 1, 1, False, device)
    steps = 0
    while (fewer := roomier(r)) is not None:
        assert fewer < r.resident
        assert REGISTERS // (r.threads * fewer) >= REGISTERS // (r.threads * r.resident) + 1
        r, steps = replace(r, resident=fewer), steps + 1
    assert steps <= 16
    assert r.resident == 1 or REGISTERS // (r.threads * r.resident) // 8 * 8 >= 255 - 7
