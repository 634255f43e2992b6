"""What is shipped: the installed package, and the documents' examples, tables and links."""

import doctest
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import xpnn
from xpnn.backends.kernel import registry

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FENCED = re.compile(r"^```pycon\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def kernels_restored():
    """Forget the kernels that a test declares."""
    before = dict(registry)
    yield
    registry.clear()
    registry.update(before)


@pytest.mark.usefixtures("kernels_restored")
@pytest.mark.parametrize("path", [p for p in DOCUMENTS if FENCED.search(p.read_text("utf-8"))], ids=lambda p: p.name)
def test_examples_of_a_document(path):
    """Every ```pycon block of a document, run in order in one session."""
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    parser = doctest.DocTestParser()
    session = {"__name__": "session"}
    text = path.read_text("utf-8")
    for module in ("torch", "jax", "dask.array"):
        if f"import {module.partition('.')[0]}" in text:
            pytest.importorskip(module, reason=f"{module} is not installed: the examples of {path.name} are not run")
    for block in FENCED.finditer(text):
        line = text.count("\n", 0, block.start())
        test = parser.get_doctest(block[1], session, path.name, str(path), line)
        complaints = []
        runner.run(test, out=complaints.append, clear_globs=False)
        session = test.globs
        assert not complaints, "".join(complaints)
    assert runner.summarize(verbose=False).attempted > 0


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_of_a_document(path):
    """Every relative link leads to a file."""
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text("utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_documents_are_found():
    names = {p.name for p in DOCUMENTS}
    assert names >= {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels.md", "numerics.md", "design.md"}


def test_readme_table_is_generated():
    """The table of the README is what its recorded run makes of it."""
    if "benchmarks/results/" not in (ROOT / "README.md").read_text("utf-8").partition("<!-- bench:begin -->")[2]:
        pytest.skip("the README shows no recorded run")
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "readme_table.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_version():
    assert importlib.metadata.version("xpnn") == xpnn.__version__
    assert f"## [{xpnn.__version__}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_typed():
    assert (Path(xpnn.__file__).parent / "py.typed").exists()


def test_every_folder_is_packaged():
    """A new folder of modules that pyproject.toml does not list would be missing from the wheel."""
    import tomllib

    setup = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    listed = set(setup["packages"])
    for package, folder in setup["package-dir"].items():
        for init in (ROOT / folder).rglob("__init__.py"):
            name = ".".join([package, *init.parent.relative_to(ROOT / folder).parts])
            assert name in listed, f"{name} is not in [tool.setuptools] packages"


def test_top_level_names():
    """The distribution brings the one import name xpnn: `kernels` and `benchmarks` belong to others."""
    files = importlib.metadata.files("xpnn") or []
    roots = {f.parts[0] for f in files if f.suffix == ".py" and not f.parts[0].startswith(("__editable__", ".."))}
    assert roots <= {"xpnn"}
