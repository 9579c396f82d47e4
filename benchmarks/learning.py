"""Trains what the results on learning together are of: the default settings beside each task alone, and few labels.

    python benchmarks/learning.py --data DIR
    python benchmarks/learning.py --data DIR --only hotels few_labels --jobs 2

DIR holds the folders `nlupp_hotels` and `ud_ewt`, as the READMEs of the data sets describe them; SNIPS and the product
reviews are among the examples. Each comparison is one `pymtl compare`, interrupted and resumed as that is. Its result
is written to docs/results, with a plot, and its tables are printed; at the end what all of them cost. All of it takes
hours on two cores.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymtl.commands import positive
from pymtl.training.markdown import table

ROOT = Path(__file__).parents[1]
OWN = Path(__file__).parent / "learning"
WAYS = ("sharing=hard,shared_private", "balancing=ew,equal_norm")
DEFAULT = ("balancing=equal_norm",)


@dataclass(frozen=True)
class Comparison:
    """A configuration, the folder of its data (relative to --data, or an example's own), and options of the command."""

    config: Path
    data: Path
    over: tuple[str, ...]
    settings: tuple[str, ...] = ()


EXAMPLES = ROOT / "examples"
REVIEWS = EXAMPLES / "product_reviews"
MADE = Path("made")  # of the treebank
CLAUSES = {"csubj", "ccomp", "xcomp", "advcl", "acl", "parataxis"}  # de Marneffe et al. 2021, "Universal Dependencies"
COMPARISONS = {
    "hotels": Comparison(OWN / "hotels.toml", Path("nlupp_hotels"), WAYS),
    "reviews": Comparison(REVIEWS / "reviews.toml", REVIEWS, DEFAULT),
    "ewt": Comparison(EXAMPLES / "ewt" / "ewt.toml", Path("ud_ewt"), DEFAULT),
    "snips": Comparison(
        EXAMPLES / "snips" / "snips.toml",
        EXAMPLES / "snips",
        ("sharing=hard,shared_private", *DEFAULT),
        ("training.epochs=5", "training.select_by=mean", "tasks.intent.weight=1", "tasks.slots.weight=1"),
    ),
    "constructions": Comparison(OWN / "constructions.toml", MADE, DEFAULT),
    "clauses": Comparison(OWN / "clauses.toml", MADE, DEFAULT),
    "intensity": Comparison(OWN / "intensity.toml", REVIEWS, (*DEFAULT, "tasks.intensity.weight=1,0.3,0.1")),
    "few_labels": Comparison(
        OWN / "few_labels.toml",
        Path("ud_ewt"),
        (
            "tasks=upos+words,upos+frequency,upos+xpos+deprel,upos+xpos+deprel+words",
            "data.limit=100,300,1000,0",
        ),
    ),
    "few_intents": Comparison(
        OWN / "few_intents.toml",
        EXAMPLES / "snips",
        ("tasks=intent+slots,intent+slots+words",),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of nlupp_hotels and ud_ewt")
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, default=list(COMPARISONS), metavar="NAME")
    parser.add_argument("--seeds", type=positive, default=5, metavar="N", help="runs of each variant (default: 5)")
    parser.add_argument("--jobs", type=positive, default=2, metavar="N", help="runs at a time (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("runs", "learning"), metavar="DIR", help="folder of all runs")
    arguments = parser.parse_args()
    for name in arguments.only:
        comparison = COMPARISONS[name]
        folder = arguments.out / name
        data = arguments.data / comparison.data
        if comparison.data == MADE:
            data = arguments.out / "data"
            _write_sentences(arguments.data / "ud_ewt", data)
        command = [sys.executable, "-m", "pymtl", "compare", str(comparison.config), "--data", str(data)]
        command += [word for each in comparison.over for word in ("--over", each)]
        command += [word for each in comparison.settings for word in ("--set", each)]
        command += ["--single-task", "--seeds", str(arguments.seeds), "--jobs", str(arguments.jobs), "--threads", "1"]
        subprocess.run([*command, "--out", str(folder)], check=True)
        for suffix in ("json", "png"):
            shutil.copyfile(folder / f"compare.{suffix}", ROOT / "docs" / "results" / f"learning_{name}.{suffix}")
        print((folder / "compare.md").read_text(encoding="utf-8"))
    print("\n".join(_costs()))


def _costs() -> list[str]:
    """The time that the comparisons in docs/results took to train, a table."""
    rows = []
    for name in COMPARISONS:
        path = ROOT / "docs" / "results" / f"learning_{name}.json"
        if path.exists():
            result = json.loads(path.read_text(encoding="utf-8"))
            runs = len(result["rows"]) * result["seeds"]
            minutes = sum(row["seconds"]["mean"] for row in result["rows"]) * result["seeds"] / 60
            rows.append([name, str(runs), f"{60 * minutes / runs:.0f}", f"{minutes / result['jobs']:.0f}"])
    return table(["comparison", "runs", "s a run", "minutes in all"], rows)


def _write_sentences(source: Path, target: Path) -> None:
    """Sentences of 3 to 40 tokens with their parts of speech, how many clauses depend on others in them, and which of
    sixty tags and relations they have: the most frequent of those that 1 to 60 % of the sentences have."""
    sets = {name: _read(source / f"{name}.jsonl.gz") for name in ("train", "dev", "test")}
    sets["train"] = [record for record in sets["train"] if 3 <= len(record["tokens"]) <= 40][:3000]
    counts = Counter(label for record in sets["train"] for label in _constructions(record))
    total = len(sets["train"])
    by_count = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    target.mkdir(parents=True, exist_ok=True)
    kept = {label for label, count in [pair for pair in by_count if 0.01 * total <= pair[1] <= 0.6 * total][:60]}
    for name, records in sets.items():
        with gzip.open(target / f"{'valid' if name == 'dev' else name}.jsonl.gz", "wt", encoding="utf-8") as file:
            for record in records:
                found = sorted(_constructions(record) & kept)
                row = {"tokens": record["tokens"], "upos": record["upos"], "constructions": found}
                row["clauses"] = sum(relation.partition(":")[0] in CLAUSES for relation in record["deprel"])
                file.write(json.dumps(row) + "\n")


def _constructions(record: dict[str, Any]) -> set[str]:
    return {f"tag:{tag}" for tag in record["xpos"]} | {f"rel:{relation}" for relation in record["deprel"]}


def _read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


if __name__ == "__main__":
    main()
