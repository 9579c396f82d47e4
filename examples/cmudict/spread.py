"""Writes the words for CTC, which finds at most one phone a token: each letter is followed by a dot.

    python examples/cmudict/spread.py      writes examples/cmudict/spread/

A few words have more phones than even that has room for ("www"): they are left out of the training words, and their
number is printed. Of the others they have no phones, so they are not scored: add them to the wrong ones.
"""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path

FOLDER = Path(__file__).parent


def steps(phones: list[str]) -> int:
    """Tokens that CTC needs: a blank between equal neighbours."""
    return len(phones) + sum(a == b for a, b in pairwise(phones))


def main() -> None:
    (FOLDER / "spread").mkdir(exist_ok=True)
    for part in ("train", "valid", "test"):
        name = f"{part}.jsonl.gz"
        with gzip.open(FOLDER / "data" / name, "rt", encoding="utf-8") as file:
            words = [json.loads(line) for line in file]
        short = 0
        with gzip.open(FOLDER / "spread" / name, "wt", encoding="utf-8") as file:
            for word in words:
                word["letters"] = [token for letter in word["letters"] for token in (letter, "·")]
                if steps(word["phones"]) > len(word["letters"]):
                    short += 1
                    word["phones"] = None
                if word["phones"] is not None or part != "train":
                    file.write(json.dumps(word, ensure_ascii=False) + "\n")
        print(f"{name}: {len(words):,} words, {short} of them without room for their phones")


if __name__ == "__main__":
    main()
