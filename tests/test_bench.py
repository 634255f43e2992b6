"""The benchmark suite: limits, the JSON of a run, its page, and its comparison with an earlier one."""

from __future__ import annotations

import html.parser
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import xpnn
from xpnn.backends.kernel import Kernel
from xpnn.benchmarks import ceiling, page, peers, report, run
from xpnn.benchmarks.cases import cases
from xpnn.cli import main


def measured(kernel: Kernel, direction: str, shape: tuple[int, ...]) -> run.Result:
    (case,) = (c for c in cases([kernel], shape=shape) if c.direction == direction)
    return run.measure(case, seconds=0.001)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    results = [measured(xpnn.softmax, "forward", (8, 4)), measured(xpnn.softmax, "forward", (16, 300))]
    results += [measured(xpnn.relu, "forward", (1 << 16,)), measured(xpnn.linear, "forward", (8, 4, 4))]
    made = report.document(results, 0.0, ceiling.rates(), {"softmax forward": run.scaling(results[0].case, 0.001)})
    return json.loads(json.dumps(made))  # as it is read back: keys are strings


def test_operations() -> None:
    """What must be evaluated, whatever the shape of the formula: one exp for each element of cross_entropy."""
    shape = (3, 5)
    counts = {(c.kernel, c.direction): c.operations for c in cases([xpnn.cross_entropy, xpnn.softmax], shape=shape)}
    assert counts[xpnn.cross_entropy, "value_and_grad"] == {"exp": 15, "log": 3}
    assert counts[xpnn.softmax, "forward"] == {"exp": 15}
    assert counts[xpnn.softmax, "backward"] == {}


def test_bytes() -> None:
    (forward, backward) = cases([xpnn.softmax], shape=(3, 5))
    assert (forward.bytes, forward.written) == (2 * 60, 60)
    assert (backward.bytes, backward.written) == (3 * 60, 60)


def test_limits(document: dict[str, Any]) -> None:
    for c in document["cases"]:
        assert c["limit_seconds"] > 0
        assert c["limit"] == "arithmetic" or c["limit_seconds"] == c["timings"][c["limit"]]["seconds"]
        assert c["timings"]["xpnn"]["first_call_seconds"] > 0
    products = [c["limit"] for c in document["cases"] if c["kernel"] == "linear"]
    assert products == ["product"]
    assert all(rate > 0 for rate in document["rates"].values())


def test_arithmetic_can_be_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "seconds_each", lambda name, dtype: 1.0)
    result = measured(xpnn.softmax, "forward", (8, 4))
    assert (result.limit, result.limit_seconds) == ("arithmetic", 32.0)


def test_reads_are_the_limit_of_what_writes_little() -> None:
    result = measured(xpnn.logsumexp, "forward", (64, 300))
    assert "read, threads" in result.timings


class Outline(html.parser.HTMLParser):
    """The open tags of a page, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text = io.StringIO()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        assert not any(name in ("src", "href") for name, _ in attrs), "the page needs something else"
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.write(data)


def test_page(document: dict[str, Any]) -> None:
    outline = Outline()
    outline.feed(page.page_of(document))
    assert outline.open == []
    text = outline.text.getvalue()
    for c in document["cases"]:
        assert c["case"].rsplit(" ", 2)[0] in text
    assert outline.seen.count("svg") == 3  # the roof, softmax's sizes, its threads
    assert "nan" not in text


def test_changes(document: dict[str, Any]) -> None:
    slow = json.loads(json.dumps(document))
    timing = slow["cases"][0]["timings"]["xpnn"]
    timing["seconds"], timing["quartiles"] = (
        3 * timing["seconds"],
        [3 * max(timing["quartiles"]), 4 * max(timing["quartiles"])],
    )
    for now, before, verdicts in ((slow, document, ["slower"]), (document, slow, ["faster"]), (document, document, [])):
        shown = report.changes(now, before)
        assert [str(cell) for cell in shown.columns[-1].cells if str(cell)] == verdicts
        assert shown.row_count == len(document["cases"])


def test_command(tmp_path: Path) -> None:
    arguments = ["bench", "--kernel", "relu", "--shape", "1024"]
    first = tmp_path / "first.json"
    done = CliRunner().invoke(main, [*arguments, "--json", str(first)], catch_exceptions=False)
    assert done.exit_code == 0
    done = CliRunner().invoke(
        main, [*arguments, "--html", str(tmp_path / "page.html"), "--against", str(first)], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert "against" in done.output
    assert "relu" in (tmp_path / "page.html").read_text("utf-8")
    done = CliRunner().invoke(main, [*arguments, "--html", str(tmp_path / "no" / "page.html")])
    assert done.exit_code == 2
    assert "there is no folder" in done.output


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam", "adamw"])
def test_steps_in_place(name: str) -> None:
    """Each contender makes its steps on arrays of its own, ours over them; PyTorch's optimiser comes to the same."""
    (case,) = cases([getattr(xpnn, name)], shape=(1000,))
    arrays = case.arrays()
    before = {n: a.copy() for n, a in arrays.items()}
    others = ["torch"] if importlib.util.find_spec("torch") else []
    found, _, notes = peers.contenders(case, arrays, others)
    assert list(found) == ["xpnn", "numpy", *others]
    assert notes == []
    with found["xpnn"].scope():
        first, second = found["xpnn"].call(), found["xpnn"].call()
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert case.bytes == (len(arrays) + len(first)) * 4000
    for n, a in arrays.items():
        assert (a == before[n]).all()


def test_steps_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = cases([xpnn.adamw], shape=(1000,))
    steps = peers._steps
    monkeypatch.setattr(peers, "_steps", lambda case, arrays, fused: steps(case, arrays if fused else spoilt(arrays), fused))

    def spoilt(arrays: dict[str, Any]) -> dict[str, Any]:
        return arrays | {"exp_avg_sq": arrays["exp_avg_sq"] * 1.01}

    with pytest.raises(peers.WrongResultError, match="numpy differs from xpnn"):
        peers.contenders(case, case.arrays())


def test_rivals_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that is missing is told of, and the others race."""
    (case,) = (c for c in cases([xpnn.softmax], shape=(8, 4)) if c.direction == "forward")

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(peers.importlib, "import_module", missing)
    found, first_calls, notes = peers.contenders(case, case.arrays(), ["scipy", "numexpr"])
    assert list(found) == list(first_calls) == ["xpnn", "numpy"]
    assert notes == [
        "softmax forward: scipy not measured: No module named 'scipy.special'",
        "softmax forward: numexpr not measured: No module named 'numexpr'",
    ]
