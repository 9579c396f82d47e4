"""``pymtl bench``: the LSTM beside nn.LSTM."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from pymtl.commands import add_weights, picture, positive, seconds, use_machine, weights_of, wide_console

EXAMPLES = """examples:
  pymtl bench                                         the default shapes
  pymtl bench --shape 1,40,64,128 --shape 8,40,64,128
  pymtl bench --threads 1 --json result.json --plot result.png
  pymtl bench --dtype bfloat16
  pymtl bench --weights int8                          and frozen in 8-bit integers
  pymtl bench --device cuda --dtype float16 --shape 16,256,512,512

columns: p50 and p90 are milliseconds; 'x' is how many times as fast pymtl is (median of interleaved ratios), below 1
where the contender is faster, as pymtl frozen is;
GFLOP/s count the matrix products (a training step thrice the forward pass), '% peak' is their share of this
machine's measured register-only multiply-adds; error is the largest difference from nn.LSTM over the largest value.

On a GPU times are CUDA events', each contender is called and replayed from a CUDA graph, and us/step is our time
divided by T.
"""


def add_parser(parsers: Any) -> argparse.ArgumentParser:
    parser = parsers.add_parser(
        "bench",
        help="time the LSTM beside nn.LSTM on your own shapes",
        description="Time a bidirectional LSTM layer beside nn.LSTM: inference and training steps, dense and of "
        "variable length, all contenders interleaved in one process.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shape", action="append", metavar="B,T,I,H", help="batch, steps, input and hidden size; may be repeated"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float64", "bfloat16", "float16"),
        default="float32",
        help="of all numbers (default: float32); float16 only on a GPU",
    )
    add_weights(parser, "time one more contender, frozen with its matrices kept so (default: none)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure (default: cpu)")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="CPU threads (default: of the cores that are free)"
    )
    parser.add_argument("--seconds", type=seconds, default=1.0, metavar="S", help="time for each row (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results with machine, versions and date")
    parser.add_argument("--plot", type=picture, metavar="FILE", help="draw the ratios (PNG)")
    return parser


def run(arguments: argparse.Namespace) -> int:
    import torch
    from rich.progress import Progress

    from pymtl.benchmark import results
    from pymtl.benchmark.lstm import DEFAULT_SHAPES, Shape, recurrence
    from pymtl.benchmark.lstm import run as measure
    from pymtl.training.errors import ConfigError

    use_machine(arguments)
    try:
        shapes = [Shape.parse(text) for text in arguments.shape or ()] or [Shape(*s) for s in DEFAULT_SHAPES]
    except ValueError as error:
        raise ConfigError(f"--shape: {error}") from None
    dtype, weights = getattr(torch, arguments.dtype), weights_of(arguments)
    if weights is not None and (arguments.device == "cuda" or dtype != torch.float32):
        raise ConfigError("--weights: expected none but with --dtype float32 on the CPU")
    if arguments.device == "cuda":
        return _on_gpu(arguments, shapes if arguments.shape else [], dtype, wide_console(150))
    if dtype == torch.float16:
        raise ConfigError("--dtype: float16 is for --device cuda only")
    console = wide_console()
    result = results.stamped(dtype=arguments.dtype, rows=[], recurrence=[])
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        modes = sum(2 if shape.batch == 1 else 4 for shape in shapes)
        task = progress.add_task("layers", total=modes)
        for row in measure(shapes, arguments.seconds, dtype, weights):
            result["rows"].append(row)
            progress.advance(task)
        if not arguments.shape:
            task = progress.add_task("kernel", total=16)
            for row in recurrence(arguments.seconds / 2, dtype):
                result["recurrence"].append(row)
                progress.advance(task)
    machine = result["machine"]
    console.print(
        f"{machine['cpu']}, {machine['instruction set in use']}, {machine['threads']} threads, "
        f"torch {machine['torch']}, {arguments.dtype}"
    )
    console.print(_layers_table(result["rows"]))
    if result["recurrence"]:
        console.print(_recurrence_table(result["recurrence"]))
    if arguments.json:
        results.write(result, arguments.json)
    if arguments.plot:
        from pymtl.benchmark.plots import speed_ratios

        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        speed_ratios(result).savefig(arguments.plot, dpi=120)
    return 0


def _on_gpu(arguments: argparse.Namespace, shapes: list[Any], dtype: Any, console: Any) -> int:
    import torch
    from rich.progress import Progress

    from pymtl.benchmark import results
    from pymtl.training.errors import ConfigError

    if not torch.cuda.is_available():
        raise ConfigError("--device: there is no GPU, or this torch has no CUDA")
    if arguments.plot:
        raise ConfigError("--plot: expected none with --device cuda")
    from pymtl.benchmark.gpu import DEFAULT_SHAPES, Case, device_facts, limits, measure, table_of

    sizes = [(s.batch, s.steps, s.input_size, s.hidden_size) for s in shapes] or DEFAULT_SHAPES
    cases = [Case(*size, dtype, fill=fill) for size in sizes for fill in ((1.0,) if size[0] == 1 else (1.0, 0.55))]
    rows = []
    found = limits()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("layers", total=len(cases))
        for case in cases:
            rows += measure(case, found, arguments.seconds)
            progress.advance(task)
    facts = device_facts()
    console.print(f"{facts['device']}, torch {torch.__version__}, cuDNN {facts['cudnn']}, {arguments.dtype}")
    console.print(table_of(rows))
    if arguments.json:
        stamped = results.stamped(**facts, dtype=arguments.dtype, limits=dataclasses.asdict(found), rows=rows)
        results.write(stamped, arguments.json)
    return 0


def _layers_table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="A bidirectional layer")
    for heading in ("shape", "mode", "contender"):
        table.add_column(heading, no_wrap=True)
    for heading in ("p50", "p90", "x", "GFLOP/s", "% peak", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        first = True
        for name, timed in row["contenders"].items():
            own = (f"{row['gflops']:.0f}", f"{100 * row['share_of_peak']:.0f}", f"{row['parity']:.0e}")
            table.add_row(
                row["shape"] if first else "",
                row["mode"] if first else "",
                name,
                f"{timed['p50']:.3f}",
                f"{timed['p90']:.3f}",
                "" if name == "pymtl" else f"{timed['ratio']:.2f}",
                *(own if first else ("", "", "")),
            )
            first = False
        table.add_section()
    return table


def _recurrence_table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="The kernel: one direction, one thread, weights packed before")
    table.add_column("shape", no_wrap=True)
    for heading in ("p50", "GFLOP/s", "% peak"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row["shape"], f"{row['p50']:.3f}", f"{row['gflops']:.0f}", f"{100 * row['share_of_peak']:.0f}")
    return table
