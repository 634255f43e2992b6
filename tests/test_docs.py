"""What the site's pages are made of, and a diff. That Sphinx builds it without a warning is for `make docs`."""

import importlib
import re
from pathlib import Path

import pytest

import xpnn
from xpnn.backends.kernel import registry

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def extension(monkeypatch):
    """Import one of the site's extensions by name."""
    pytest.importorskip("sphinx", reason="Sphinx is not installed: the pages of the site are not looked at")
    monkeypatch.syspath_prepend(DOCS / "_ext")
    return importlib.import_module


@pytest.fixture
def config():
    from sphinx.ext.napoleon import Config

    return Config()


@pytest.fixture
def triple():
    """A kernel that was not there when the pages' code was written."""
    known = dict(registry)

    @xpnn.kernel
    def triple(xp, x):
        """Three times |x|, of x."""
        return xp.abs(x) * 3

    yield triple
    registry.clear()
    registry.update(known)


def test_every_kernel_has_one_place(extension):
    reference = extension("reference")
    names = [name for members in reference.families().values() for _, names in members for name in names]
    assert sorted(names) == sorted(xpnn.kernels.__all__)
    assert {"softmax", "linear", "cross_entropy"} <= set(names)


def test_page_of_a_family(extension, config):
    reference = extension("reference")
    module, members = next((m, v) for m, v in reference.families().items() if m.__name__ == "xpnn.kernels.normalizers")
    page = reference.family(module, members, config)
    for text in (
        "softmax(x, axis=-1, *, out=None)",
        "softmax.backward(dy, y=None, *, x=None, axis=-1, wrt=None, out=None)",
        "∂yᵢ/∂xⱼ = yᵢ(δᵢⱼ − yⱼ)",
        "return e / xp.sum(e, axis=-1, keepdims=True)",
        "%1 = row_max(%0)",
        "def stage0(",
        "softmax_0(const T* x",
        "block: a block per row",
        "softmax_jacobian(x, *, axis=-1)",
    ):
        assert text in page
    assert '"""∂yᵢ' not in page  # a derivation stands above its formula, not in it once more
    assert "struct Divisor" not in page  # nor what all CUDA kernels begin with


def test_a_new_kernel_needs_nothing(extension, config, monkeypatch, triple):
    reference = extension("reference")
    monkeypatch.setattr(xpnn.kernels, "triple", triple, raising=False)
    monkeypatch.setattr(xpnn.kernels, "__all__", [*xpnn.kernels.__all__, "triple"])
    triple.__module__ = "xpnn.kernels.activations"
    module, members = next((m, v) for m, v in reference.families().items() if m.__name__ == "xpnn.kernels.activations")
    assert (triple, ["triple"]) in members
    page = reference.family(module, members, config)
    assert r"Three times \|x\|, of x." in page  # bars would be a substitution
    assert "return xp.abs(x) * 3" in page
    assert "triple.backward" not in page


def test_contents(extension):
    """A link under each heading of index.md; what is not linked comes last."""
    contents = extension("contents")
    text = f"# Top\n\n## Learn\n\n- [One](one.md), and more\n\n## Reference\n\n{contents.MARK}\n- [Two](two.md)\n\n## Install\n"
    trees = contents.toctrees(text, {"index", "one", "two", "three", "reference/kernels"})
    captions = [line for line in trees.splitlines() if ":caption:" in line]
    assert captions == [":caption: Learn", ":caption: Reference", ":caption: More"]
    assert "\nOne <one>\n" in trees
    assert "\nKernels <reference/kernels>\n" in trees
    assert trees.rindex("three") > trees.rindex(":caption: More")


def test_pages_of_sources(extension):
    """Links to files outside of docs/ lead to pages that there are."""
    sources = extension("sources")
    text = ["[a `file`](../kernels/normalizers.py), [beside](design.md), [elsewhere](https://example.org)"]
    sources.relink(None, "page", text)
    assert text[0].startswith('<a class="reference internal" href="source/kernels/normalizers.py.html">a `file`</a>, [beside]')
    assert {"kernels", "kernels/normalizers.py", "backends/cupy", "backends/cupy/prelude.cuh"} <= set(sources.linked(DOCS))


def test_the_diff_of_an_activation():
    """Each line that is shown as added is in its file; … is what was left out."""
    diff = (DOCS.parent / "CONTRIBUTING.md").read_text("utf-8").partition("```diff\n")[2].partition("```")[0]
    parts = re.split(r"^\+\+\+ (.*)\n", diff, flags=re.MULTILINE)[1:]
    assert parts[::2] == ["kernels/rectifiers.py", "kernels/__init__.py", "tests/oracles.py", "tools/accuracy.py"]
    for path, lines in zip(parts[::2], parts[1::2], strict=True):
        text = (DOCS.parent / path).read_text("utf-8")
        added = [line[1:] for line in lines.splitlines() if line.startswith("+")]
        assert added
        for line in added:
            assert re.search("^" + ".*".join(map(re.escape, line.split("…"))) + "$", text, re.MULTILINE), line
