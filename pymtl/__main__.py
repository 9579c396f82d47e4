"""The command line: ``pymtl init``, ``train``, ``predict``, ``evaluate``, ``compare``, ``export``, ``report``,
``bench`` and ``info``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from pymtl.commands import cores

COMMANDS = ("init", "train", "predict", "evaluate", "compare", "export", "report", "bench", "info")
OPTIONAL = (
    "accelerate",
    "matplotlib",
    "rich",
    "safetensors",
    "scipy",
    "seqeval",
    "sklearn",
    "tensorboard",
    "tomli",
    "torchmetrics",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit status: 0, 1 for trouble, 2 for bad arguments, 130 for Ctrl-C."""
    cores.begin()
    parser = argparse.ArgumentParser(
        prog="pymtl", description="Recurrent multi-task learning, fast: train, predict and measure."
    )
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        command = importlib.import_module(f"pymtl.commands.{name}")
        command.add_parser(parsers).set_defaults(run=command.run)
    arguments, more = parser.parse_known_args(argv)
    # argparse ends a list of positional arguments at the first option; texts may follow one all the same.
    if more and (not hasattr(arguments, "texts") or any(text.startswith("-") for text in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        arguments.texts += more
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name == "torchjd" or "torchjd" in str(error):
            print("pymtl: error: gradient aggregation needs torchjd: pip install 'pymtl[torchjd]'", file=sys.stderr)
            return 1
        if name == "onnx":
            print("pymtl: error: writing ONNX takes onnx: pip install onnx", file=sys.stderr)
            return 1
        if name not in OPTIONAL:
            raise
        print(f"pymtl: error: this command needs {error.name}: pip install 'pymtl[cli]'", file=sys.stderr)
        return 1
    except (OSError, ValueError, RuntimeError) as error:
        from pymtl.training.errors import ConfigError, DataError, RunError

        no_memory = "can't allocate memory" in str(error)  # torch's way to say so
        if not isinstance(error, OSError | ConfigError | DataError | RunError) and not no_memory:
            raise
        print(f"pymtl: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
