"""``pymtl init``: a configuration to begin with."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  pymtl init tickets.csv                       writes tickets.toml beside it
  pymtl init tickets.csv --text body           where another column is taken for the text
  pymtl train tickets.toml
"""


def add_parser(parsers: Any) -> argparse.ArgumentParser:
    parser = parsers.add_parser(
        "init",
        help="write a configuration for a data file",
        description="Look at the fields of a data file (CSV, TSV, JSON lines, a JSON list, CoNLL columns) and write a "
        "commented configuration: which field is the text, and a task for each field that looks like a label.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="data file")
    parser.add_argument("--text", metavar="FIELD", help="the field of the text (default: the one that looks like it)")
    parser.add_argument(
        "--format",
        choices=("auto", "jsonl", "json", "csv", "tsv", "conll"),
        default="auto",
        help="how FILE is read (default: as its name says)",
    )
    parser.add_argument("--out", type=Path, metavar="CONFIG", help="file to write (default: FILE's name with .toml)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there already")
    return parser


def run(arguments: argparse.Namespace) -> int:
    import os
    import shlex

    from pymtl.training.errors import ConfigError
    from pymtl.training.starting import start

    plain = arguments.file.name.removesuffix(".gz")
    target = arguments.out or arguments.file.with_name(plain).with_suffix(".toml")
    if target.exists() and target.samefile(arguments.file):
        raise ConfigError(f"--out: expected another file than the data, got {target}")
    if target.exists() and not arguments.overwrite:
        raise ConfigError(f"{target}: is there already: pass --overwrite or --out")
    written = os.path.relpath(arguments.file, target.parent)
    found = start(arguments.file, arguments.text, written, arguments.format)
    target.write_text(found.toml, encoding="utf-8")
    print("\n".join(found.lines))
    print(f"{target}: look it over, then: pymtl train {shlex.quote(str(target))}")
    return 0
