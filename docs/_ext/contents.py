"""The table of contents: what docs/index.md links to under each of its headings, so that it stands in one place.

A document that index.md does not mention comes last, under "More".
"""

import re

BUILT = {
    "reference/kernels": "[Kernels]: each with its derivation, its definition, the loop and the CUDA kernel that it becomes",
    "reference/python": "[Python names]: everything else that is imported",
    "reference/command-line": "[Command line]: what `xpnn` can be asked",
}
MARK = "<!-- built pages -->"
TITLE = re.compile(r"\[(.*?)\]")
LINK = re.compile(r"^- \[([^]]+)\]\(([\w-]+)\.md\)", re.MULTILINE)
TREE = "\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n"


def toctrees(text, documents):
    """One for each heading of index.md that has links below it."""
    found = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        entries = [f"{title} <{name}>" for title, name in LINK.findall(section)]
        if MARK in section:
            entries = [*(f"{TITLE.match(words)[1]} <{page}>" for page, words in BUILT.items()), *entries]
        if entries:
            found[section.partition("\n")[0]] = entries
    listed = {name for entries in found.values() for e in entries for name in re.findall(r"<(.*)>", e)}
    if rest := sorted(n for n in documents if "/" not in n and n != "index" and n not in listed):
        found["More"] = rest
    return "".join(TREE.format(caption=caption, entries="\n".join(entries)) for caption, entries in found.items())


def add(app, name, content):
    if name == "index":
        links = "\n".join("- " + TITLE.sub(rf"[\1]({page}.rst)", words, count=1) for page, words in BUILT.items())
        content[0] = content[0].replace(MARK, links) + toctrees(content[0], app.env.found_docs)


def setup(app):
    app.connect("source-read", add)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
