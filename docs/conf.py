"""Sphinx's settings for the documentation: `make docs`."""

import re
from typing import Any

from docutils import nodes

from pymtl import __version__

project = "pymtl"
author = copyright = "the pymtl authors"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"pymtl {version}"
myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]
autodoc_typehints = "none"  # the docstrings say more: shapes, dtypes, units
autodoc_member_order = "bysource"
nitpicky = False
exclude_patterns = ["results/*"]

TORCH = "https://docs.pytorch.org/docs/stable/generated/{}.html"


def link_to_torch(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Names of torch's link to its own reference, without asking the network for an index of it."""
    target = node.get("reftarget", "")
    if not target.startswith("torch."):
        return None
    return nodes.reference("", "", contnode, internal=False, refuri=TORCH.format(target))


# Pages that stand elsewhere in the repository, where their readers look for them first.
ELSEWHERE = {
    "../benchmarks/README.md": "benchmarks.md",
    "../examples/README.md": "examples.md",
    "../examples/third_party/README.md": "third_party.md",
    "../README.md": "start.md",
    "third_party/README.md": "third_party.md",
    "../docs/": "",
}


def link_to_pages(app: Any, name: str, source: list[str]) -> None:
    """Links between files of the repository lead to pages of the site."""
    for file, page in ELSEWHERE.items():
        source[0] = source[0].replace(f"({file}", f"({page}")


def link_included(app: Any, path: Any, name: str, source: list[str]) -> None:
    link_to_pages(app, name, source)
    source[0] = re.sub(r"\[([^\]]+)\]\([^)]+\.(?:toml|json)\)", r"\1", source[0])  # files, not pages


def setup(app: Any) -> None:
    app.connect("source-read", link_to_pages)
    app.connect("include-read", link_included)
    app.connect("missing-reference", link_to_torch)
