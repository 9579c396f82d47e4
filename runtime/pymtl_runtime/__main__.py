"""``python -m pymtl_runtime``: answers of a model's file, and what is in it."""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

from . import DataError, ModelError, __version__, isa
from .library import Model
from .predictor import load
from .serving.predicting import described, input_of
from .serving.search_options import add_search_options, given_options, refuse_idle, search_of

FOLDER = Path(__file__).parent

EXAMPLES = """examples:
  python -m pymtl_runtime predict snips.pymtl "play some jazz by miles davis"
  cat sentences.txt | python -m pymtl_runtime predict snips.pymtl --json
  python -m pymtl_runtime predict --records srl.pymtl < sentences.jsonl
  python -m pymtl_runtime predict phones.pymtl "p h y s i c s" --beam 5 --nbest 3
  python -m pymtl_runtime info snips.pymtl
  cc predict.c $(python -m pymtl_runtime flags) -o predict
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        "python -m pymtl_runtime",
        description="Answers of a model that 'pymtl export RUN FILE.pymtl' wrote, without torch.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    predict = commands.add_parser(
        "predict", help="label texts", description="Label texts: each class with its probability, spans marked."
    )
    predict.add_argument("file", type=Path, metavar="FILE", help="the model's file")
    predict.add_argument("texts", nargs="*", metavar="TEXT", help="texts; lines of standard input if there is none")
    predict.add_argument("--json", action="store_true", help="print one JSON object a text")
    predict.add_argument("--records", action="store_true", help="texts are JSON objects with the fields of training")
    predict.add_argument("--threads", type=int, default=0, metavar="N", help="of a call (default 0: all cores)")
    add_search_options(predict)
    info = commands.add_parser("info", help="what a file reads and answers")
    info.add_argument("file", type=Path, metavar="FILE", help="the model's file")
    commands.add_parser("flags", help="what a C compiler needs to find pymtl.h and the library")
    parser.add_argument("--version", action="version", version=__version__)
    given, further = parser.parse_known_args(arguments)
    # argparse takes no texts behind an option once it has seen that there were none before it.
    end = further.index("--") if "--" in further else len(further)
    if given.command != "predict" or given.texts or any(text.startswith("-") for text in further[:end]):
        given = parser.parse_args(arguments)
    elif further:
        given.texts = further[:end] + further[end + 1 :]
    try:
        return {"predict": _predict, "info": _info, "flags": _flags}[given.command](given)
    except BrokenPipeError:  # whoever reads has had enough
        sys.stdout = None  # or Python would try to write the rest, and complain
        return 1
    except KeyboardInterrupt:
        return 130
    except (DataError, ModelError, MemoryError, OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _flags(given: argparse.Namespace) -> int:
    print(f"-I{FOLDER / 'include'} -L{FOLDER} -lpymtl_runtime -Wl,-rpath,{FOLDER}")
    return 0


def _predict(given: argparse.Namespace) -> int:
    # Whatever the locale says; a mark of the byte order is no text.
    for stream, encoding, errors in (
        (sys.stdin, "utf-8-sig", "surrogateescape"),
        (sys.stdout, "utf-8", "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=encoding, errors=errors)
    predictor = load(given.file, given.threads)
    if predictor.config.fields and not given.records:
        fields = ", ".join(predictor.config.fields)
        raise DataError(f"this model reads {fields} of each token too: give JSON objects with these, and --records")
    search = search_of(given)
    refuse_idle(given_options(given), (task.rules for task in predictor.tasks.values()))
    if not given.texts and sys.stdin is None:
        raise DataError("expected texts, or lines of standard input, which is closed")
    texts = given.texts or (line.rstrip("\r\n") for line in sys.stdin)
    for number, text in enumerate(texts, 1):
        asked = [input_of(text, number, given.records)]
        answer = predictor.predict(asked, distributions=False, first=number, search=search)[0]
        if given.json:
            print(json.dumps(answer, ensure_ascii=False), flush=True)
        elif not answer["tokens"]:  # an empty line stays one
            print(flush=True)
        else:
            print("\n".join([*([""] if number > 1 else []), *described(answer, predictor)]), flush=True)
    return 0


def _info(given: argparse.Namespace) -> int:
    model = Model(given.file)
    about = _about(model)
    by = about.get("pymtl", "of an unknown version")
    size = given.file.stat().st_size
    print(f"{given.file}: {f'{size / 1e6:.1f} MB' if size >= 1e6 else f'{size / 1e3:.0f} kB'}, by pymtl {by}")
    print(f"instruction set: {isa()}")
    for each in model.inputs:
        what = f"{each.size} numbers a token" if each.kind == "numbers" else f"{each.kind} below {each.size}"
        print(f"reads {each.name}: {what}")
    for task in model.tasks:
        rows = "tokens" if task.of_tokens else "texts"
        labels = f", labels {_some(task.labels)}" if task.labels else ""
        logits_alone = " (its logits)" if task.kind in ("path", "ctc") else ""
        streams = f", in a stream too{logits_alone}" if task.streams else ""
        logits = f"{task.columns} tokens" if task.kind == "generated" else f"{task.columns} logits"
        print(f"answers {task.name}: {task.kind} of {rows}, {logits}{labels}{streams}")
    if "weights" in about:
        print(f"weights of recurrent layers: {about['weights']}")
    return 0


def _about(model: Model) -> dict[str, Any]:
    """What the file says of itself; nothing if it says something else."""
    try:
        about = json.loads(model.description)
    except ValueError:
        return {}
    return about if isinstance(about, dict) else {}


def _some(labels: list[str]) -> str:
    return ", ".join(labels[:6]) + (f" and {len(labels) - 6} others" if len(labels) > 6 else "")


if __name__ == "__main__":
    sys.exit(main())
