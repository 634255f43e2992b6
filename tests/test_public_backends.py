"""Choosing a backend, and looking into kernels: explain, source, warmup, signature, help, pickle, repr."""

from __future__ import annotations

import copy
import inspect
import pickle
import pydoc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import xpnn

X = np.random.default_rng(5).normal(size=(4, 5))


@pytest.fixture(autouse=True)
def backend_left_as_found() -> Iterator[None]:
    from xpnn.backends import choice

    before = choice.process
    yield
    assert choice.context.get() is None
    choice.process = before


def here(x: Any = X) -> str:
    return xpnn.softmax.explain(x)


# --- choosing -----------------------------------------------------------------------------------------------------------


def test_auto_is_numba_for_numpy() -> None:
    assert here() == "numba"
    assert here(X.astype(np.float32)) == here(X.astype(np.float16)) == "numba"
    assert here([[1, 2]]) == "numba"


def test_explain_says_why_not() -> None:
    reason = here(X.astype(np.longdouble))
    assert reason.startswith("array-api")
    assert "float16" in reason
    assert "numba" in reason


def test_nesting() -> None:
    with xpnn.use_backend("numpy"):
        assert here() == "numpy"
        with xpnn.use_backend("numba"):
            assert here() == "numba"
            with xpnn.use_backend("array-api"):
                assert here() == "array-api"
            with xpnn.use_backend("auto"):
                assert here() == "numba"
        assert here() == "numpy"
        with pytest.raises(RuntimeError, match="inside"), xpnn.use_backend("numba"):
            raise RuntimeError("inside")
        assert here() == "numpy"
    assert here() == "numba"


def test_each_thread_has_its_own() -> None:
    found: dict[str, str] = {}
    inside = threading.Barrier(3, timeout=60)

    def work(name: str) -> None:
        with xpnn.use_backend(name):
            inside.wait()  # all are inside at once
            found[name] = here()
            inside.wait()

    names = ("numpy", "numba", "array-api")
    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == {n: n for n in names}


def test_a_thread_does_not_inherit() -> None:
    found = []
    with xpnn.use_backend("numpy"):
        thread = threading.Thread(target=lambda: found.append(here()))
        thread.start()
        thread.join()
    assert found == ["numba"]


def test_process_wide() -> None:
    found = []
    xpnn.set_backend("numpy")
    thread = threading.Thread(target=lambda: found.append(here()))
    thread.start()
    thread.join()
    assert [here(), *found] == ["numpy", "numpy"]
    with xpnn.use_backend("numba"):
        assert here() == "numba"
    with xpnn.use_backend("auto"):
        assert here() == "numba"
    xpnn.set_backend("auto")
    assert here() == "numba"


def test_the_choice_is_really_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The composed backend runs the formula itself; the fused one does not, even the second time."""
    ran = []

    @xpnn.kernel
    def spied(xp: Any, x: Any) -> Any:
        ran.append(xp)
        return xp.tanh(x)

    for _ in range(2):
        spied(X)
    traced = len(ran)
    for _ in range(3):
        spied(X)
    assert len(ran) == traced
    with xpnn.use_backend("numpy"):
        spied(X)
        before = len(ran)
        spied(X)
        assert len(ran) == before + 1
        assert ran[-1].tanh is np.tanh


@pytest.mark.parametrize("name", ["numpy", "numba", "auto", "array-api"])
def test_environment(python: Callable[..., str], name: str) -> None:
    code = """
        import numpy as np, xpnn
        print(xpnn.softmax.explain(np.ones(3)))
        xpnn.set_backend("array-api")
        print(xpnn.softmax.explain(np.ones(3)))
    """
    assert python(code, XPNN_BACKEND=name).split() == [{"auto": "numba"}.get(name, name), "array-api"]


def test_bad_environment(python: Callable[..., str]) -> None:
    error = python("import xpnn; xpnn.softmax([1.0])", fails=True, XPNN_BACKEND="cuda")
    last = error.strip().splitlines()[-1]
    assert last.startswith("ValueError")
    assert "'cuda'" in last
    assert "numba" in last


# --- looking inside -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_source_is_python(case: Any, dtype: str, direction: str) -> None:
    if case.kernel.declaration.driver is not None:
        with pytest.raises(xpnn.BackendError, match="it has no code of its own"):
            case.kernel.source(dtype=dtype, direction=direction, **case.options)
        return
    text = case.kernel.source(dtype=dtype, direction=direction, **case.options)
    compile(text, case.id, "exec")
    if case.name == "linear":
        assert "np.matmul" in text
    if case.name != "linear" or case.options:
        assert f"xpnn: {case.name} (" in text
        assert dtype in text
    if direction == "forward":
        assert text != case.kernel.source(dtype=dtype, direction="backward", **case.options)


def test_source_of_options() -> None:
    plain = xpnn.cross_entropy.source(direction="value_and_grad")
    smooth = xpnn.cross_entropy.source(direction="value_and_grad", label_smoothing=0.1)
    assert "label_smoothing" in smooth
    assert "label_smoothing" not in plain
    assert smooth == xpnn.cross_entropy.source(direction="value_and_grad", label_smoothing=0.3)
    assert plain != xpnn.cross_entropy.source(direction="value_and_grad", reduction="sum")


def test_source_is_what_runs(python: Callable[..., str], tmp_path: Any) -> None:
    """The file that a call leaves in the cache folder holds the text that `source` returned."""
    code = "import numpy as np, xpnn; xpnn.tanh(np.ones(3)); print(xpnn.tanh.source(dtype='float64'))"
    text = python(code, XPNN_CACHE_DIR=str(tmp_path / "cache")).strip()
    files = [p.read_text().strip() for p in (tmp_path / "cache").rglob("tanh_*.py")]
    assert any(f in text for f in files)


def test_warmup_compiles_ahead(python: Callable[..., str], tmp_path: Any) -> None:
    """After a warm-up the call adds nothing to the cache."""
    code = """
        import numpy as np, os, pathlib, xpnn
        folder = pathlib.Path(os.environ["XPNN_CACHE_DIR"])
        names = lambda: sorted(p.name for p in folder.rglob("*") if p.is_file() and "softmax" in p.name)
        xpnn.softmax.warmup(dtype="float64")
        before = names()
        xpnn.softmax(np.ones((2, 3)))
        assert before == names() and any(n.endswith(".nbc") for n in before), before
        xpnn.softmax(np.ones((2, 3), np.float32))
        print(len(names()) > len(before))
    """
    assert python(code, XPNN_CACHE_DIR=str(tmp_path / "cache")).strip() == "True"


def test_signature() -> None:
    """Names and defaults are torch.nn.functional's, `dim` being `axis`."""
    assert str(inspect.signature(xpnn.softmax)) == "(x, axis=-1, *, out=None)"
    assert str(inspect.signature(xpnn.relu)) == "(x, *, out=None)"
    assert str(inspect.signature(xpnn.linear)) == "(x, weight, bias=None, *, activation=None, out=None)"
    assert str(inspect.signature(xpnn.cross_entropy_probs)) == "(probs, target, *, axis=-1, out=None)"
    known = inspect.signature(xpnn.cross_entropy).parameters
    want = {
        "weight": None, "row_scale": None, "divisor": None, "ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0,
        "z_loss": 0.0,
        "softcap": None, "return_lse": False, "return_argmax": False, "return_accuracy": False, "axis": -1, "out": None,
    }  # fmt: skip
    assert {n: p.default for n, p in known.items() if p.kind is p.KEYWORD_ONLY} == want
    assert [*known][:2] == ["logits", "target"]
    assert [*inspect.signature(xpnn.softmax.backward).parameters] == ["dy", "y", "x", "axis", "wrt", "out"]


def test_signature_binds_what_the_call_takes(any_case: Any) -> None:
    kernel, options = any_case.kernel, any_case.options
    arrays = any_case.arrays()
    first, *others = arrays.items()
    bound = inspect.signature(kernel).bind(first[1], **dict(others), **options)
    np.testing.assert_array_equal(kernel(*bound.args, **bound.kwargs), kernel(**arrays, **options))


def test_help(any_case: Any) -> None:
    case = any_case
    text = pydoc.plain(pydoc.render_doc(case.kernel))
    first = case.kernel.__doc__.splitlines()[0]
    assert first in text
    for part in ("Parameters", "Returns", "Examples"):
        assert part in case.kernel.__doc__
    for name in case.arrays():
        assert f"\n    {name}\n" in case.kernel.__doc__
    assert case.kernel.backward.__doc__


def test_identity_survives_pickling(any_case: Any) -> None:
    kernel = any_case.kernel
    for again in (pickle.loads(pickle.dumps(kernel)), copy.copy(kernel), copy.deepcopy(kernel)):
        assert again is kernel


def test_repr() -> None:
    assert repr(xpnn.softmax) == "<kernel softmax(x, axis=-1, *, out=None)>"
    assert repr(xpnn.softmax.backward) == "<softmax.backward(dy, y=None, *, x=None, axis=-1, wrt=None, out=None)>"
    assert (xpnn.softmax.__name__, xpnn.softmax.__module__) == ("softmax", "xpnn.kernels.normalizers")
    assert inspect.unwrap(xpnn.softmax) is xpnn.softmax.forward_formula
