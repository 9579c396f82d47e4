"""Models of other packages before and after pymtl.convert: how far results differ, and how much faster they are.

    python examples/third_party/compare.py [NAME...] [--json FILE]

Each model has random weights, or those in its package. A copy in float64 says how far torch's float32 is off; ours may
be off by twice that, plus 4 epsilon of the largest value. That is asked of the outputs, and of each recurrent layer's
gradients, given the input and the output's gradient that torch's model has there. The gradients of the whole model are
shown, not judged: where a ReLU's input is all but zero, rounding decides on which side, for either. Dropout is off for
this.

Times are of whole models: forward, and forward and backward in training mode. Each ratio is the median of interleaved
runs. What is not installed is skipped: see requirements.txt.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from models import MODELS, Case, Entry
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import pymtl
from pymtl.benchmark import results
from pymtl.benchmark.timing import interleaved
from pymtl.recurrent import Recurrent

EPSILON = torch.finfo(torch.float32).eps


def build(entry: Entry, seed: int = 0) -> Case:
    torch.manual_seed(seed)
    case = entry.build()
    case.model.eval()
    return case


def in_float64(entry: Entry, case: Case) -> Case:
    """The same weights and inputs in float64."""
    model = build(entry).model.double()
    model.load_state_dict(case.model.state_dict())
    inputs = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.inputs.items()
    }
    return Case(model, inputs, case.call)


def loss_of(outputs: Sequence[Tensor]) -> Tensor:
    return torch.stack([output.square().mean() for output in outputs]).sum()


def outputs_and_gradients(model: nn.Module, case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """What the model returns, and the gradient of each of its parameters that has one."""
    torch.manual_seed(1)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    outputs = case.call(model, case.inputs)
    gradients = torch.autograd.grad(loss_of(outputs), parameters, allow_unused=True)
    kept = [torch.zeros(0) if gradient is None else gradient for gradient in gradients]
    return [output.detach() for output in outputs], kept


def differences(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor]) -> dict[str, Any]:
    """The largest differences, each in units of its tensor's largest value, and whether ours are near enough."""
    found: dict[str, Any] = {"difference": 0.0, "ours from float64": 0.0, "torch from float64": 0.0, "within": True}
    largest = max(float(true.abs().max()) for true in exact if true.numel())
    for our, their, true in zip(ours, theirs, exact):
        scale = float(true.abs().max()) if true.numel() else 0.0
        if scale <= EPSILON**2 * largest:  # zero but for rounding, such as a bias's in front of a normalisation
            continue
        apart, our_error, their_error = (
            float((a.double() - b).abs().max()) for a, b in [(our, their), (our, true), (their, true)]
        )
        found["within"] &= our_error <= 2 * their_error + 4 * EPSILON * scale
        for name, value in zip(found, (apart, our_error, their_error)):
            found[name] = max(found[name], value / scale)
    return found


def accuracy(entry: Entry, case: Case, converted: nn.Module) -> dict[str, dict[str, Any]]:
    ours, theirs = (outputs_and_gradients(model, case) for model in (converted, case.model))
    reference = in_float64(entry, case)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of what a model makes on its way
    try:
        exact = outputs_and_gradients(reference.model, reference)
    finally:
        torch.set_default_dtype(default)
    layers = zip(*(layer_gradients(*call) for call in layer_calls(case, converted)))
    layer_results = [[tensor for layer in results for tensor in layer] for results in layers]
    return {
        "outputs": differences(ours[0], theirs[0], exact[0]),
        "gradients": differences(ours[1], theirs[1], exact[1]),
        "layers' gradients": differences(*layer_results),
    }


def layer_calls(case: Case, converted: nn.Module) -> list[tuple[nn.Module, nn.Module, Any, Tensor]]:
    """For each recurrent layer: ours, torch's, what it is first called with, and its output's gradient."""
    fast = dict(converted.named_modules())
    calls: dict[str, tuple[Any, Tensor]] = {}
    handles = []
    for name, layer in case.model.named_modules():
        if not isinstance(layer, nn.RNNBase):
            continue

        def called(_: nn.Module, arguments: Any, result: Any, name: str = name) -> None:
            if name not in calls:
                calls[name] = (arguments, data_of(result[0]))

        handles.append(layer.register_forward_hook(called))
    loss = loss_of(case.call(case.model, case.inputs))
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(loss, [output for _, output in calls.values()])
    return [
        (fast[name], case.model.get_submodule(name), arguments, gradient)
        for (name, (arguments, _)), gradient in zip(calls.items(), gradients)
    ]


def layer_gradients(ours: nn.Module, theirs: nn.Module, arguments: Any, gradient: Tensor) -> list[list[Tensor]]:
    """The gradients of the input and the weights by ours, torch's and torch's in float64."""
    exact = copy.deepcopy(theirs).double()
    found = []
    for layer, dtype in ((ours, torch.float32), (theirs, torch.float32), (exact, torch.float64)):
        input, *states = (with_gradient(argument, dtype) for argument in arguments)
        output = data_of(layer(input, *states)[0])
        leaves = [data_of(input), *layer.parameters()]
        found.append(list(torch.autograd.grad(output, leaves, gradient.to(dtype))))
    return found


def data_of(value: Tensor | PackedSequence) -> Tensor:
    return value.data if isinstance(value, PackedSequence) else value


def with_gradient(value: Any, dtype: torch.dtype) -> Any:
    """A leaf of its own for a tensor, a PackedSequence, or several states."""
    if isinstance(value, PackedSequence):
        return value._replace(data=with_gradient(value.data, dtype))
    if isinstance(value, Tensor):
        return value.detach().to(dtype).requires_grad_()
    return None if value is None else tuple(with_gradient(part, dtype) for part in value)


def inference(model: nn.Module, case: Case) -> Callable[[None], None]:
    def run(_: None) -> None:
        model.eval()
        with torch.no_grad():
            case.call(model, case.inputs)

    return run


def training(model: nn.Module, case: Case) -> Callable[[None], None]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def run(_: None) -> None:
        model.train()
        torch.autograd.grad(loss_of(case.call(model, case.inputs)), parameters, allow_unused=True)

    return run


def timed(step: Callable[..., Callable[[None], None]], case: Case, converted: nn.Module, seconds: float) -> Any:
    contenders = {"pymtl": step(converted, case), "torch": step(case.model, case)}
    contenders["torch"](None)
    started = time.perf_counter()
    contenders["torch"](None)
    rounds = int(seconds / (time.perf_counter() - started))
    return interleaved(contenders, [None] * min(max(rounds, 5), 200), "pymtl")


def recurrent_share(case: Case, runs: int = 5) -> float:
    """The share of torch's time for inference that its recurrent layers take: what convert can make shorter."""
    spent = 0.0

    def starts(module: nn.Module, _: Any) -> None:
        nonlocal spent
        spent -= time.perf_counter()

    def ends(module: nn.Module, _: Any, __: Any) -> None:
        nonlocal spent
        spent += time.perf_counter()

    handles = []
    for layer in recurrent(case.model):
        handles += [layer.register_forward_pre_hook(starts), layer.register_forward_hook(ends)]
    run = inference(case.model, case)
    started = time.perf_counter()
    for _ in range(runs):
        run(None)
    taken = time.perf_counter() - started
    for handle in handles:
        handle.remove()
    return spent / taken


def recurrent(model: nn.Module) -> list[nn.RNNBase]:
    return [module for module in model.modules() if isinstance(module, nn.RNNBase)]


def compare(entry: Entry, seconds: float) -> dict[str, Any]:
    case = build(entry)
    converted = build(entry).model  # another one: not every model can be copied
    converted.load_state_dict(case.model.state_dict())
    pymtl.convert(converted, inplace=True)
    layers = recurrent(converted)
    return {
        "package": f"{entry.package} {importlib.metadata.version(entry.package)}",
        "model": entry.model,
        "input": entry.input,
        "layers": dict(Counter(type(layer).__name__ for layer in recurrent(case.model))),
        "converted": sum(isinstance(layer, Recurrent) for layer in layers),
        **accuracy(entry, case, converted),
        "recurrent share": recurrent_share(case),
        "inference": timed(inference, case, converted, seconds),
        "training": timed(training, case, converted, seconds),
    }


def cells(row: dict[str, Any]) -> list[str]:
    found = ", ".join(f"{count} {kind}" for kind, count in row["layers"].items())
    if row["converted"] != sum(row["layers"].values()):
        found += f" ({row['converted']} converted)"
    apart = [f"{row[k]['difference']:.0e}" for k in ("outputs", "layers' gradients", "gradients")]
    for k, name in enumerate(("outputs", "layers' gradients")):
        apart[k] += "" if row[name]["within"] else " !"
    times = [f"{row[mode]['torch']['p50']:.1f}" for mode in ("inference", "training")]
    ratios = [f"{row[mode]['torch']['ratio']:.2f}" for mode in ("inference", "training")]
    share = f"{100 * row['recurrent share']:.0f} %"
    model = f"{row['package']}: {row['model']}"
    return [model, row["input"], found, *apart, share, times[0], ratios[0], times[1], ratios[1]]


HEADINGS = (
    "model",
    "input",
    "layers",
    "outputs",
    "layers' gradients",
    "all gradients",
    "recurrent",
    "inference",
    "times as fast",
    "training",
    "times as fast",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODELS)}; all by default")
    parser.add_argument("--seconds", type=float, default=4.0, help="to time each model and mode for, about")
    parser.add_argument("--threads", type=int, default=2, help="of torch and pymtl")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results with machine, versions and date")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(MODELS))
    if unknown:
        parser.error(f"expected names of {', '.join(MODELS)}, got {', '.join(unknown)}")
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # of the packages
    warnings.filterwarnings("default", message="convert left alone")
    console = Console(width=None if Console().is_terminal else 150)
    table = Table(
        title="Models of other packages before and after pymtl.convert",
        caption="Differences are in units of their tensor's largest value, ! if too large. "
        "recurrent: the layers' share of torch's inference. inference, training: torch's milliseconds.",
    )
    for k, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if k < 3 else "right")
    rows = {}
    for name in arguments.names or MODELS:
        entry = MODELS[name]
        if importlib.util.find_spec(entry.package) is None:
            console.print(f"{name}: skipped, {entry.package} is not installed (requirements.txt has the version)")
            continue
        try:
            with console.status(name):
                rows[name] = compare(entry, arguments.seconds)
        except ImportError as error:
            console.print(f"{name}: skipped, {entry.package} does not import: {error}")
            continue
        table.add_row(*cells(rows[name]))
    if rows:
        console.print(table)
    if arguments.json:
        results.write(results.stamped(rows=rows), arguments.json)


if __name__ == "__main__":
    main()
