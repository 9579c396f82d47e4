"""``pymtl predict``: what a trained model says of texts, on the command line or in a file."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymtl.commands import FROZEN_WEIGHTS, add_machine, add_weights, picture, positive, use_machine, weights_of
from pymtl.serving.search_options import add_search_options, given_options, refuse_idle, search_of

if TYPE_CHECKING:
    from pymtl.serving.generation import Search
    from pymtl.training.kinds import Kind
    from pymtl.training.predictor import Answer, Predictor

EXAMPLES = """examples:
  pymtl predict runs/snips "play some jazz by miles davis"
  cat sentences.txt | pymtl predict runs/snips --json
  pymtl predict runs/orders --input new.csv --output answers.csv       other columns are kept
  pymtl predict runs/srl --records < sentences.jsonl      records with further fields, as trained on
  pymtl predict runs/phones "p h y s i c s" --beam 5 --nbest 3       the three best answers that a search finds
  pymtl predict runs/phones "p h y s i c s" --attention read.png     what each token of the answer was read from
  pymtl predict runs/stories "once upon a" --continue 20 --sample --temperature 0.8
"""


def add_parser(parsers: Any) -> argparse.ArgumentParser:
    parser = parsers.add_parser(
        "predict",
        help="label texts with a trained model",
        description="Label texts with a trained model: each class with its probability, spans marked in the text. "
        "Texts are split into tokens as in training.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder of pymtl train or export")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="texts; lines of standard input if there is none")
    parser.add_argument("--json", action="store_true", help="print one JSON object a text")
    parser.add_argument(
        "--input", type=Path, metavar="FILE", help="label the texts of a file in a format of training's"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write --input's rows with the answers: .csv, .tsv or .jsonl"
    )
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="texts at a time (default: 64)")
    parser.add_argument(
        "--records", action="store_true", help="texts are JSON objects with the fields that training read"
    )
    _add_generation(parser)
    add_weights(parser, FROZEN_WEIGHTS)
    add_machine(parser)
    return parser


def _add_generation(parser: argparse.ArgumentParser) -> None:
    group = add_search_options(parser)
    group.add_argument(
        "--attention",
        type=picture,
        metavar="FILE.png",
        help=f"draw how much each token of the first {MOST_DRAWN} answers read of the text; --json then gives it too "
        "(of TEXTs, not of --input)",
    )
    group.add_argument(
        "--continue",
        dest="count",
        type=positive,
        metavar="N",
        help="go on with the texts, N tokens each, by the run's language model of one direction",
    )


def run(arguments: argparse.Namespace) -> int:
    from pymtl.serving.predicting import described, input_of
    from pymtl.training.errors import ConfigError
    from pymtl.training.predictor import Predictor

    use_machine(arguments)
    if (arguments.input is None) != (arguments.output is None):
        raise ConfigError("--input and --output: expected both, the file to label and the file to write, or neither")
    if arguments.input is not None and arguments.texts:
        raise ConfigError("TEXT: expected none beside --input")
    for number, text in enumerate(arguments.texts, 1):
        if not arguments.records and _is_file(text):
            raise ConfigError(f"text {number}: {text} is a file: --input {text} --output FILE labels what it holds")
    search = search_of(arguments)
    predictor = Predictor(arguments.run_folder, arguments.device, weights=weights_of(arguments))
    _check_generation(predictor, arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack letters, and an argument be no text
    if arguments.count is not None:
        _go_on(predictor, arguments, search)
        return 0
    if arguments.input is not None:
        _label_file(predictor, arguments, search)
        return 0
    if predictor.config.fields and not arguments.records:
        raise ConfigError(f"--records: expected it with a model that reads {', '.join(predictor.config.fields)}")
    number = 1
    first = True
    for texts in [arguments.texts] if arguments.texts else _lines():
        inputs = [input_of(text, number + i, arguments.records) for i, text in enumerate(texts)]
        drawn = arguments.attention is not None
        answers = predictor.predict(inputs, arguments.batch_size, distributions=drawn, first=number, search=search)
        if drawn:
            _draw_attention(predictor, answers, arguments.attention)
        for answer in answers:
            if arguments.json:
                print(json.dumps(answer, ensure_ascii=False))
            elif not answer["tokens"]:  # an empty line stays one, so that lines out match lines in
                print()
                first = True
            else:
                print("\n".join(([] if first else [""]) + described(answer, predictor)))
                first = False
        sys.stdout.flush()
        number += len(texts)
    return 0


def _check_generation(predictor: Predictor, arguments: argparse.Namespace) -> None:
    """That there is something that the options are for.

    Raises:
        ConfigError, DataError: there is not.
    """
    from pymtl.training.errors import ConfigError

    others = {"--attention": arguments.attention, "--input": arguments.input}
    asked = [*given_options(arguments), *(option for option, value in others.items() if value is not None)]
    if arguments.count is not None:
        for option in ("--input", "--attention", "--max-length", "--coverage-penalty", "--length-penalty"):
            if option in asked:
                raise ConfigError(f"{option}: expected none beside --continue")
        return
    searching = [option for option in asked if option != "--input"]
    if searching and all(task.kind == "language_model" for task in predictor.tasks.values()):
        raise ConfigError(f"{searching[0]}: expected --continue N with it, to go on with a text")
    refuse_idle(searching, (task.rules for task in predictor.tasks.values()))
    if arguments.attention is not None and (arguments.input is not None or not arguments.texts):
        raise ConfigError(
            "--attention: expected texts as arguments, whose answers are drawn, not --input or piped ones"
        )


def _go_on(predictor: Predictor, arguments: argparse.Namespace, search: Search | None) -> None:
    """Prints the texts with what comes behind them."""
    from pymtl.serving.predicting import input_of
    from pymtl.training.errors import ConfigError

    number = 1
    for texts in [arguments.texts] if arguments.texts else _lines():
        inputs = [input_of(text, number + i, arguments.records) for i, text in enumerate(texts)]
        try:
            answers = predictor.go_on(inputs, arguments.count, search, arguments.batch_size, number)
        except ConfigError as error:
            raise ConfigError(f"--continue: {error}") from None
        for answer in answers:
            print(json.dumps(answer, ensure_ascii=False) if arguments.json else "\n".join(answer["texts"]))
        sys.stdout.flush()
        number += len(texts)


MOST_DRAWN = 12  # answers in one picture


def _draw_attention(predictor: Predictor, answers: Sequence[Answer], path: Path) -> None:
    from pymtl.serving.tokenizing import JOINER
    from pymtl.training.plots import attention_plot
    from pymtl.training.run import Run

    generated = {name: task for name, task in predictor.tasks.items() if task.rules.generates}
    panels = [
        (
            answer.get(f"{name}/split", answer["tokens"]),
            [token.strip(JOINER) or token for token in answer[f"{name}/written"]],
            answer[f"{name}/attention"],
            _title(name, task, answer),
        )
        for answer in answers
        for name, task in generated.items()
        if name in answer
    ]
    if not panels:
        print(f"{path}: not written, since there is no answer to draw", file=sys.stderr)
        return
    figure = attention_plot(panels[:MOST_DRAWN])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a box stands for it
        Run(path.parent).save_figure(path.name, figure)
    print(f"{path}: {min(len(panels), MOST_DRAWN)} of {len(panels)} answers", file=sys.stderr)


def _title(name: str, task: Any, answer: Answer) -> str:
    """The best answer, as it is printed where it is the only one."""
    details = {key: answer[f"{name}/{key}"] for key in ("probability", "ended")}
    return f"{name}: {task.rules.describe(answer[name], details, answer['tokens'], task)}"


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or with a zero in it
        return False


def _lines() -> Iterator[list[str]]:
    """The lines of standard input, as many at a time as are there: who writes one and waits gets its answer."""
    from pymtl.training.errors import DataError

    if not hasattr(sys.stdin, "buffer"):
        yield [line.rstrip("\n") for line in sys.stdin]
        return
    number = 0
    rest = b""
    while True:
        chunk = sys.stdin.buffer.read1(1 << 16)
        *lines, rest = (rest + chunk).split(b"\n")
        if not chunk and rest:
            lines, rest = [rest], b""
        if number == 0 and lines:
            lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
        texts = []
        for line in lines:
            number += 1
            try:
                texts.append(line.decode("utf-8").removesuffix("\r"))
            except UnicodeDecodeError as error:
                yield texts  # those before it have their answers
                raise DataError(f"standard input, line {number}: not UTF-8: {error}") from None
        if texts:
            yield texts
        if not chunk:
            return


def _label_file(predictor: Predictor, arguments: argparse.Namespace, search: Search | None) -> None:
    """Writes the rows of a file with the answers behind them."""
    import csv

    from pymtl.training.data import rows_of
    from pymtl.training.errors import ConfigError, DataError
    from pymtl.training.run import Run

    form = arguments.output.suffix.lower()
    if form not in (".csv", ".tsv", ".jsonl"):
        raise ConfigError(f"--output: expected a file that ends in .csv, .tsv or .jsonl, got {arguments.output}")
    if not arguments.output.parent.is_dir():
        raise ConfigError(f"--output: there is no folder {arguments.output.parent}")
    if arguments.output.exists() and arguments.output.samefile(arguments.input):
        raise ConfigError("--output: expected another file than --input")
    rows = rows_of(arguments.input, predictor.config)
    own = list(dict.fromkeys(name for row in rows for name in row.values))
    answers: list[Answer] = []
    block = 50 * arguments.batch_size
    for start in _watched(range(0, len(rows), block)):
        part = [row.values for row in rows[start : start + block]]
        try:
            answers += predictor.predict(
                part, arguments.batch_size, distributions=form == ".jsonl", first=start + 1, search=search
            )
        except DataError as error:
            raise DataError(f"{arguments.input}: {error}") from None

    def write(path: Path) -> None:
        # Half of a surrogate pair is JSON, but no text: it is written as its escape.
        encoding = "utf-8-sig" if form != ".jsonl" and _has_mark(arguments.input) else "utf-8"
        with open(path, "w", encoding=encoding, newline="", errors="backslashreplace") as file:
            if form == ".jsonl":
                key = _free("predicted", own)
                for row, answer in zip(rows, answers):
                    values = {name: None if _is_nan(value) else value for name, value in row.values.items()}
                    file.write(json.dumps({**values, key: answer}, ensure_ascii=False) + "\n")
                return
            added = {name: _free(f"predicted_{name.replace('/', '_')}", own) for name in _columns_of(answers)}
            kinds = {task.field or name: task.rules for name, task in predictor.tasks.items()}
            rules = {name: task.rules for name, task in predictor.tasks.items()}
            numeric = {n for n in added if n not in rules or rules[n].reads_numbers(predictor.tasks[n])}
            comma = ";" if rows[0].decimal_comma else ","  # as the input has it
            table = csv.writer(file, delimiter="\t" if form == ".tsv" else comma, lineterminator="\n")
            table.writerow([*own, *added.values()])
            for row, answer in zip(rows, answers):
                given = [_cell(row.values.get(name), kinds.get(name)) for name in own]
                found = [_cell(answer.get(name), rules.get(name)) for name in added]
                if rows[0].decimal_comma:
                    found = [_with_comma(v) if n in numeric else v for n, v in zip(added, found)]
                table.writerow([*given, *found])

    Run(arguments.output.parent).write_file(arguments.output.name, write)
    empty = sum(not answer["tokens"] for answer in answers)
    without = f", {empty:,} without text" if empty else ""
    print(f"{arguments.output}: {len(answers):,} rows{without}")


def _watched(starts: range) -> Iterable[int]:
    """The same with a bar, on a terminal where rich is installed: predicting needs only the extra "predict"."""
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        return starts
    from rich.console import Console
    from rich.progress import track

    return track(starts, "labelling", console=Console(stderr=True), transient=True)


def _has_mark(path: Path) -> bool:
    """Whether a file begins with a byte order mark, by which spreadsheets know UTF-8."""
    with open(path, "rb") as file:
        return file.read(3) == b"\xef\xbb\xbf"


def _columns_of(answers: Sequence[Answer]) -> list[str]:
    """What answers say, each task before what is said of it, and unknown tokens last."""
    names = dict.fromkeys(name for answer in answers for name in answer if name not in ("tokens", "unknown_tokens"))
    return [*names, "unknown_tokens"]


def _free(name: str, taken: Sequence[str]) -> str:
    """The name, or one with a number behind it where there is a column of that name already."""
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and value != value


def _cell(value: Any, rules: Kind | None) -> Any:
    """A value as a table has it, and as training reads it where it is a task's label or answer."""
    if value is None or _is_nan(value):
        return ""
    if isinstance(value, str):
        return value
    if rules is not None and not any(
        isinstance(item, dict | list) for item in (value if isinstance(value, list) else ())
    ):
        try:
            return rules.as_cell(value)
        except (TypeError, ValueError):  # a field of that name that is no label
            return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list) and all(isinstance(item, str) and item and not _has_space(item) for item in value):
        return " ".join(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict | bool) else value


def _with_comma(cell: Any) -> Any:
    """A number, or several, as a table with semicolons has them."""
    text = f"{cell:.10g}" if isinstance(cell, float) else str(cell)
    parts = text.split()
    numbers = all(re.fullmatch(r"-?\d+(\.\d+)?(e[-+]\d+)?", part) for part in parts)
    return text.replace(".", ",") if parts and numbers else cell


def _has_space(text: str) -> bool:
    return any(character.isspace() for character in text)
