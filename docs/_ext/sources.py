"""Links that leave docs/ for a file or a folder of the checkout lead to pages that show it, as they do on a code host."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\[([^]]+)\]\(\.\./([^)#\s]+)\)")
LEXERS = {".py": "python", ".cuh": "cuda", ".h": "cpp", ".cpp": "cpp", ".json": "json", ".toml": "toml", ".md": "markdown"}
COLOURED = 100_000  # characters; beyond it, such as in a long recorded run, colours take seconds


def relink(app, name, content):
    """Markdown links to files outside of docs/, as links to their pages."""
    content[0] = LINK.sub(r'<a class="reference internal" href="source/\2.html">\1</a>', content[0])


def linked(folder):
    """The kernels, what the documents link to, and what lies in linked folders."""
    todo = {"kernels"} | {
        target.rstrip("/") for path in folder.glob("*.md") for _, target in LINK.findall(path.read_text("utf-8"))
    }
    found = set()
    while todo:
        path = todo.pop()
        found.add(path)
        todo |= {p.relative_to(ROOT).as_posix() for p in inside(ROOT / path)} - found
    return sorted(found)


def inside(folder):
    """The sources and folders of sources in a folder."""
    if not folder.is_dir():
        return []
    return [p for p in sorted(folder.iterdir()) if p.suffix in LEXERS or (p / "__init__.py").exists()]


def pages(app):
    for path in linked(Path(app.srcdir)):
        file = ROOT / path
        if file.is_dir():
            names = [p.name for p in inside(file)]
            shown = "".join(f'<li><a href="{file.name}/{n}.html">{n}</a></li>' for n in names)
            shown = f"<ul>{shown}</ul>"
        else:
            text = file.read_text("utf-8")
            lexer = LEXERS.get(file.suffix, "text") if len(text) < COLOURED else "text"
            shown = app.builder.highlighter.highlight_block(text, lexer)
        yield f"source/{path}", {"title": path, "body": f"<h1>{path}</h1>{shown}"}, "page.html"


def setup(app):
    app.connect("source-read", relink)
    app.connect("html-collect-pages", pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
