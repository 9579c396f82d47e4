"""Writes the page of all keys of a configuration, from the dataclasses and the comments beside their fields.

python docs/configuration.py    writes docs/configuration.md
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pymtl.training import config
from pymtl.training.kinds import KINDS

HEAD = """\
# Every key of a configuration

<!-- Written by docs/configuration.py from the dataclasses: change those, and run it. -->

A configuration is a TOML file. `pymtl init FILE` writes one for a data file; `--set section.key=value` overrides a key
on the command line. A key that does not exist, or a value that does not fit, is named with what was expected. Paths are
relative to the configuration's own folder.
"""
SECTIONS = (
    ("At the top", config.Config, ""),
    ("[data], or [datasets.NAME] where there are several", config.DataConfig, ""),
    ("[tasks.NAME]", config.TaskConfig, "What every task has; further keys depend on its `kind`, below."),
    ("[fields.NAME]", config.FieldConfig, ""),
    ("[characters]", config.CharactersConfig, ""),
    ("[model]", config.ModelConfig, ""),
    ("[warm_start]", config.WarmStartConfig, ""),
    ("[training]", config.TrainingConfig, ""),
)
METHODS = """
## sharing, balancing

A name, `sharing = "soft"`, or a section with a `kind` and options of its own, `[sharing]` with `kind = "soft"` and
`penalty = "trace_norm"`. [Sharing](sharing/index.md) and [balancing](balancing/index.md) have a page for each.
"""


class Key(NamedTuple):
    """A field of a dataclass: its name, type and default as they are written, and the comment beside or above it."""

    name: str
    type: str
    default: str
    comment: str


def keys_of(cls: type) -> Iterator[Key]:
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    (tree,) = ast.parse(source).body
    for node in tree.body:
        if not isinstance(node, ast.AnnAssign):
            continue
        last = lines[node.end_lineno - 1]
        comment = last[len(last[: node.end_col_offset]) :].partition("#")[2].strip()
        above = node.lineno - 2
        before = []
        while not comment and lines[above].strip().startswith("#"):
            before.insert(0, lines[above].strip().lstrip("# "))
            above -= 1
        default = "required" if node.value is None else _default(ast.unparse(node.value))
        yield Key(node.target.id, _type(ast.unparse(node.annotation)), default, comment or " ".join(before))


def _type(annotation: str) -> str:
    choices = re.fullmatch(r"Literal\[(.*)\]", annotation)
    if choices:
        return ", ".join(f"`{text.strip()}`" for text in choices[1].replace("'", '"').split(","))
    if annotation == "MethodConfig":
        return "`str` or section"
    if annotation == "KindName":
        return ", ".join(f'`"{name}"`' for name in KINDS)
    return " or ".join(f"`{part.strip()}`" for part in annotation.replace(" | None", "").split("|"))


def _default(value: str) -> str:
    empty = re.search(r"default_factory=(\w+)", value)
    if empty:
        return {"list": "`[]`", "dict": "`{}`"}.get(empty[1], "")
    if value in ("None", "True", "False"):
        return {"None": "", "True": "`true`", "False": "`false`"}[value]
    return "" if "default_factory" in value or "field(" in value else f"`{value}`".replace("'", '"')


def _comment(text: str) -> str:
    """With values as code, and no capital at the beginning."""
    text = re.sub(r'"([^" ]*)"', r'`"\1"`', text)
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def table(keys: list[Key]) -> list[str]:
    """A table in Markdown."""
    lines = ["| key | value | default | what it sets |", "| --- | --- | --- | --- |"]
    for key in keys:
        cells = (f"`{key.name}`", key.type, key.default, _comment(key.comment))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def page() -> str:
    lines = [HEAD]
    sections = ("data", "datasets", "tasks", "fields", "characters", "model", "warm_start", "training")
    for title, cls, text in SECTIONS:
        keys = [key for key in keys_of(cls) if not (cls is config.Config and key.name in (*sections, "folder"))]
        lines += [f"## {title}", "", *([text, ""] if text else []), *table(keys), ""]
        if cls is config.TaskConfig:
            for name, kind in KINDS.items():
                own = [key for base in reversed(kind.Options.__mro__[:-1]) for key in keys_of(base)]
                if own:
                    lines += [f'### kind = "{name}"', "", *table(own), ""]
    return "\n".join(lines).rstrip() + "\n" + METHODS


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page(), encoding="utf-8")
