"""A program as an ONNX graph of standard operators.

Inputs are padded: ids int64 [B, T], characters int64 [B, T, W], numbers float32 [B, T, F], each under its field's name,
and ``lengths`` int64 [B]. Outputs are ``<task>/logits``, [B, T, C] (0 at padding) or [B, C], and ``<task>/answer``: ids
of classes and tags, int64 [B, T] or [B], of CTC those of the likeliest path with its blanks (0) and repeats; of several
labels bool [B, C]; of numbers float32 [B, C] in the data's units. The best path of a conditional random field is found
in the graph (Viterbi 1967).

Within the graph rows of tokens are [T, B, F] and those of characters [W, T * B, F], as ONNX's recurrent operators want
them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pymtl.lowering.program import Program

if TYPE_CHECKING:
    import onnx

OPSET = 17
IR_VERSION = 8  # of the file, which readers of that opset know
LENGTHS = "lengths"
PREFIX = "pymtl::"  # of names within the graph, so that no field's or task's is the same
# ONNX's order of the gates, as places in torch's
_GATES = {"LSTM": [0, 3, 1, 2], "GRU": [1, 0, 2], "RNN_TANH": [0], "RNN_RELU": [0]}


def to_onnx(program: Program, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """The graph, checked by onnx.

    Args:
        metadata: kept in the file as it is.

    Raises:
        ImportError: there is no onnx.
        ValueError: ONNX has no operators for an instruction, or a task's answers are generated; the message names it.
    """
    try:
        import onnx
    except ModuleNotFoundError:
        raise ModuleNotFoundError("writing ONNX takes onnx: pip install onnx", name="onnx") from None
    for task in program.tasks:
        if task["decoder"] == "generation":
            raise ValueError(
                f"task {task['name']!r}: expected answers from one run of a graph, got generated ones, which take "
                "a run for each token: export to a .pymtl file or a folder"
            )
    graph = _Graph(program)
    for each in program.inputs:
        graph.add_input(each)
    graph.prepare()
    for instruction in program.instructions:
        _INSTRUCTIONS[instruction["op"]](graph, instruction)
    for task in program.tasks:
        graph.add_task(task)
    model = graph.model(metadata)
    onnx.checker.check_model(model, full_check=True)
    return model


class _Graph:
    """A graph as it is being written; values are the names of tensors."""

    def __init__(self, program: Program) -> None:
        from onnx import TensorProto, helper

        self.program = program
        self.helper, self.types = helper, TensorProto
        self.nodes: list[Any] = []
        self.constants: dict[tuple[Any, ...], str] = {}
        self.weights: dict[str, np.ndarray] = {}
        self.initializers: list[Any] = []
        self.inputs = [helper.make_tensor_value_info(LENGTHS, TensorProto.INT64, ["batch"])]
        self.outputs: list[Any] = []
        self.values: dict[str, str] = {}  # of buffers
        self.spaces: dict[str, str] = {}
        self.widths: dict[str, int] = {}
        self.words: dict[str, str] = {}  # of characters [W, N]
        self.lengths = {"tokens": LENGTHS}
        self.masks: dict[str, str] = {}  # of tokens [T, B, 1], of characters [W, N, 1]

    # Pieces.

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """An operator's output, or its outputs if there are several; a plain name if it is one."""
        names = [f"{PREFIX}{kind}{len(self.nodes)}" + (f".{i}" if i else "") for i in range(outputs)]
        self.nodes.append(self.helper.make_node(kind, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        array = np.asarray(value, dtype)
        key = (array.tobytes(), array.shape, array.dtype.str)
        if key not in self.constants:
            name = f"{PREFIX}constant{len(self.constants)}"
            self.initializers.append(_initializer(array, name))
            self.constants[key] = name
        return self.constants[key]

    def weight(self, array: np.ndarray, name: str) -> str:
        """A constant by this name, or by another where another one has it: a tensor may be read in several forms."""
        own, number = name, 2
        while own in self.weights and not np.array_equal(self.weights[own], array):
            own, number = f"{name}.{number}", number + 1
        if own not in self.weights:
            self.weights[own] = array
            self.initializers.append(_initializer(np.ascontiguousarray(array), own))
        return own

    def tensor(self, name: str) -> np.ndarray:
        value = self.program.tensors[name]
        if value.dtype != torch.float32:
            raise ValueError(f"{name}: ONNX's recurrent operators take float32, got {value.dtype}: leave out weights")
        return value.numpy()

    def reshape(self, x: str, *shape: int) -> str:
        """0 keeps a dimension, -1 is what is left."""
        return self.op("Reshape", x, self.constant(shape))

    def unsqueeze(self, x: str, *axes: int) -> str:
        return self.op("Unsqueeze", x, self.constant(axes))

    def squeeze(self, x: str, *axes: int) -> str:
        return self.op("Squeeze", x, self.constant(axes))

    def sum(self, x: str, axis: int, keepdims: int = 0) -> str:
        return self.op("ReduceSum", x, self.constant([axis]), keepdims=keepdims)

    def columns(self, x: str, first: int, count: int) -> str:
        ends = [self.constant([each]) for each in (first, first + count, -1)]
        return self.op("Slice", x, *ends)

    # The graph's parts.

    def add_input(self, field: Mapping[str, Any]) -> None:
        name, kind = field["name"], field["kind"]
        outputs = [f"{task['name']}/{what}" for task in self.program.tasks for what in ("logits", "answer")]
        if name == LENGTHS or name in outputs:
            raise ValueError(
                f"{name}: expected a field of another name, since ONNX's lengths or an output have this one"
            )
        shapes = {"ids": ["batch", "steps"], "characters": ["batch", "steps", "letters"]}
        shape = shapes.get(kind, ["batch", "steps", field.get("size")])
        dtype = self.types.FLOAT if kind == "numbers" else self.types.INT64
        self.inputs.append(self.helper.make_tensor_value_info(name, dtype, shape))
        if kind == "numbers":
            self.define(name, self.op("Transpose", name, perm=[1, 0, 2]), "tokens", field["size"])
        elif kind == "ids":
            self.values[name] = self.op("Transpose", name, perm=[1, 0])
        else:
            by_step = self.op("Transpose", name, perm=[1, 0, 2])
            self.words[name] = self.op("Transpose", self.reshape_words(by_step), perm=[1, 0])

    def reshape_words(self, by_step: str) -> str:
        """[T, B, W] to [T * B, W]."""
        width = self.op("Gather", self.op("Shape", by_step), self.constant([2]))
        return self.op("Reshape", by_step, self.op("Concat", self.constant([-1]), width, axis=0))

    def prepare(self) -> None:
        """What all instructions share: the lengths, and which rows are tokens."""
        first = self.program.inputs[0]["name"]
        shape = self.op("Shape", first)
        self.steps = self.op("Gather", shape, self.constant(1))
        self.batch = self.op("Gather", shape, self.constant([0]))
        self.masks["tokens"] = self.mask(self.steps, LENGTHS)
        for ids in self.words.values():
            some = self.op("Cast", self.op("Greater", ids, self.constant(0)), to=self.types.INT64)
            self.lengths["characters"] = self.op("Max", self.sum(some, 0), self.constant(1))
            letters = self.op("Gather", self.op("Shape", ids), self.constant(0))
            self.masks["characters"] = self.mask(letters, self.lengths["characters"])

    def mask(self, steps: str, lengths: str) -> str:
        places = self.unsqueeze(self.op("Range", self.constant(0), steps, self.constant(1)), 1)
        return self.unsqueeze(self.op("Less", places, self.unsqueeze(lengths, 0)), 2)

    def define(self, name: str, value: str, space: str, width: int) -> None:
        self.values[name], self.spaces[name], self.widths[name] = value, space, width

    def only_input(self, instruction: Mapping[str, Any]) -> tuple[str, str, int]:
        """The value, space and width."""
        (name,) = instruction["inputs"]
        return self.values[name], self.spaces[name], self.widths[name]

    def add_task(self, task: Mapping[str, Any]) -> None:
        name, buffer, decoder = task["name"], task["logits"], task["decoder"]
        z, of_tokens = self.values[buffer], self.spaces[buffer] == "tokens"
        shape: list[Any] = ["batch", "steps", self.widths[buffer]] if of_tokens else ["batch", self.widths[buffer]]
        if of_tokens:
            kept = self.op("Where", self.masks["tokens"], z, self.constant(0.0, np.float32))
            self.output(f"{name}/logits", self.op("Transpose", kept, perm=[1, 0, 2]), self.types.FLOAT, shape)
        else:
            self.output(f"{name}/logits", z, self.types.FLOAT, shape)
        answer = f"{name}/answer"
        if decoder in ("classes", "ctc", "crf"):
            ids = self.viterbi(z, task) if decoder == "crf" else self.op("ArgMax", z, axis=-1, keepdims=0)
            if of_tokens:
                ids = self.op("Where", self.squeeze(self.masks["tokens"], 2), ids, self.constant(0))
                ids = self.op("Transpose", ids, perm=[1, 0])
            self.output(answer, ids, self.types.INT64, shape[:-1])
        elif decoder == "ordinal":
            above = self.op("Cast", self.op("Greater", z, self.constant(0.0, np.float32)), to=self.types.INT64)
            self.output(answer, self.sum(above, -1), self.types.INT64, shape[:-1])
        elif decoder == "labels":
            self.output(answer, self.op("Greater", z, self.constant(0.0, np.float32)), self.types.BOOL, shape)
        elif decoder == "numbers":
            mean, std = (self.constant(task[key], np.float32) for key in ("mean", "std"))
            value = self.op("Add", self.op("Mul", z, std), mean)
            self.output(answer, self.op("Exp", value) if task["log"] else value, self.types.FLOAT, shape)

    def output(self, name: str, value: str, dtype: int, shape: Sequence[Any]) -> None:
        self.nodes.append(self.helper.make_node("Identity", [value], [name]))
        self.outputs.append(self.helper.make_tensor_value_info(name, dtype, shape))

    def viterbi(self, z: str, task: Mapping[str, Any]) -> str:
        """The best path [T, B] through emissions [T, B, C]. Behind a sequence's end its last tag stays."""
        helper, types = self.helper, self.types
        start, end, transitions = (self.weight(self.tensor(task[k]), task[k]) for k in ("start", "end", "transitions"))
        classes = self.widths[task["logits"]]
        beginning = self.op("Add", self.op("Gather", z, self.constant(0)), start)
        rest = [self.constant([each]) for each in (1, np.iinfo(np.int64).max, 0)]
        first = [self.constant([each]) for each in (0, 1, 0)]
        # One step more, which is no token: ONNX Runtime scans no empty sequence, as the rest of a single token is.
        mask = self.masks["tokens"]
        later = self.op("Concat", self.op("Slice", z, *rest), self.op("Slice", z, *first), axis=0)
        none = self.op("Not", self.op("Slice", mask, *first))
        is_token = self.op("Concat", self.op("Slice", mask, *rest), none, axis=0)
        stay = self.constant(np.arange(classes)[None])

        def info(name: str, dtype: int, shape: list[Any]) -> Any:
            return helper.make_tensor_value_info(name, dtype, shape)

        def own(name: str) -> str:
            return f"{PREFIX}{task['name']}/{name}"

        body = helper.make_graph(
            [
                helper.make_node("Unsqueeze", [own("before"), self.constant([2])], [own("column")]),
                helper.make_node("Add", [own("column"), transitions], [own("through")]),
                helper.make_node("ReduceMax", [own("through")], [own("best")], axes=[1], keepdims=0),
                helper.make_node("ArgMax", [own("through")], [own("from")], axis=1, keepdims=0),
                helper.make_node("Add", [own("best"), own("emissions")], [own("reached")]),
                helper.make_node("Where", [own("is_token"), own("reached"), own("before")], [own("scores")]),
                helper.make_node("Where", [own("is_token"), own("from"), stay], [own("back")]),
            ],
            own("step"),
            [
                info(own("before"), types.FLOAT, ["batch", classes]),
                info(own("emissions"), types.FLOAT, ["batch", classes]),
                info(own("is_token"), types.BOOL, ["batch", 1]),
            ],
            [info(own("scores"), types.FLOAT, ["batch", classes]), info(own("back"), types.INT64, ["batch", classes])],
        )
        scores, back = self.op("Scan", beginning, later, is_token, outputs=2, body=body, num_scan_inputs=2)
        last = self.op("ArgMax", self.op("Add", scores, end), axis=1, keepdims=1)
        body = helper.make_graph(
            [
                helper.make_node("GatherElements", [own("came"), own("tag")], [own("previous")], axis=1),
                helper.make_node("Identity", [own("previous")], [own("written")]),
            ],
            own("trace"),
            [info(own("tag"), types.INT64, ["batch", 1]), info(own("came"), types.INT64, ["batch", classes])],
            [info(own("previous"), types.INT64, ["batch", 1]), info(own("written"), types.INT64, ["batch", 1])],
        )
        options = {"scan_input_directions": [1], "scan_output_directions": [1], "num_scan_inputs": 1}
        _, path = self.op("Scan", last, back, outputs=2, body=body, **options)
        return self.squeeze(path, 2)

    def model(self, metadata: Mapping[str, str]) -> Any:
        helper = self.helper
        graph = helper.make_graph(self.nodes, "pymtl", self.inputs, self.outputs, self.initializers)
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="pymtl")
        helper.set_model_props(model, dict(metadata))
        return model


def _initializer(array: np.ndarray, name: str) -> Any:
    from onnx import numpy_helper

    return numpy_helper.from_array(array, name)


# One function for each instruction.


def _gather(graph: _Graph, it: Mapping[str, Any]) -> None:
    (field,) = it["inputs"]
    table = graph.tensor(it["table"])
    of_characters = bool(it.get("characters"))
    ids = graph.words[field] if of_characters else graph.values[field]
    found = graph.op("Gather", graph.weight(table, it["table"]), ids)
    graph.define(it["output"], found, "characters" if of_characters else "tokens", table.shape[1])


def _character_cnn(graph: _Graph, it: Mapping[str, Any]) -> None:
    (field,) = it["inputs"]
    rows = graph.op("Gather", graph.weight(graph.tensor(it["table"]), it["table"]), graph.words[field])
    rows = graph.op("Transpose", rows, perm=[1, 2, 0])  # [N, E, W]
    outside = graph.op("Transpose", graph.op("Not", graph.masks["characters"]), perm=[1, 2, 0])
    weight, bias, filters = graph.tensor(it["weight"]), graph.tensor(it["bias"]), it["filters"]
    parts, row = [], 0
    for i, width in enumerate(it["widths"]):
        own = weight[row : row + width * filters].reshape(width, filters, -1).transpose(1, 2, 0)
        row += width * filters
        names = [
            graph.weight(own, f"{it['weight']}.{width}.{i}"),
            graph.weight(bias[i * filters : (i + 1) * filters], f"{it['bias']}.{width}.{i}"),
        ]
        found = graph.op("Conv", rows, *names, kernel_shape=[width], pads=[width // 2] * 2)
        found = graph.op("Where", outside, graph.constant(-np.inf, np.float32), found)
        parts.append(graph.op("ReduceMax", found, axes=[2], keepdims=0))
    whole = parts[0] if len(parts) == 1 else graph.op("Concat", *parts, axis=1)
    _of_words(graph, it["output"], whole, filters * len(parts))


def _of_words(graph: _Graph, name: str, rows: str, width: int) -> None:
    """[T * B, F] as rows of tokens."""
    shape = graph.op("Concat", graph.constant([-1]), graph.batch, graph.constant([width]), axis=0)
    graph.define(name, graph.op("Reshape", rows, shape), "tokens", width)


def _concatenate(graph: _Graph, it: Mapping[str, Any]) -> None:
    columns = it.get("columns") or [{"first": 0, "count": graph.widths[name]} for name in it["inputs"]]
    parts = []
    for name, part in zip(it["inputs"], columns):
        whole = part["first"] == 0 and part["count"] == graph.widths[name]
        value = graph.values[name]
        parts.append(value if whole else graph.columns(value, part["first"], part["count"]))
    found = parts[0] if len(parts) == 1 else graph.op("Concat", *parts, axis=-1)
    width = sum(part["count"] for part in columns)
    graph.define(it["output"], found, graph.spaces[it["inputs"][0]], width)


def _linear(graph: _Graph, it: Mapping[str, Any]) -> None:
    x, space, _ = graph.only_input(it)
    weight = graph.tensor(it["weight"])
    found = graph.op("MatMul", x, graph.weight(weight.T, it["weight"]))
    if "bias" in it:
        found = graph.op("Add", found, graph.weight(graph.tensor(it["bias"]), it["bias"]))
    graph.define(it["output"], found, space, weight.shape[0])


def _activation(graph: _Graph, it: Mapping[str, Any]) -> None:
    x, space, width = graph.only_input(it)
    graph.define(it["output"], graph.op(it["kind"].capitalize(), x), space, width)


def _softmax(graph: _Graph, it: Mapping[str, Any]) -> None:
    x, space, width = graph.only_input(it)
    graph.define(it["output"], graph.op("Softmax", x, axis=-1), space, width)


def _multiply(graph: _Graph, it: Mapping[str, Any]) -> None:
    first, second = it["inputs"]
    found = graph.op("Mul", graph.values[first], graph.values[second])
    graph.define(it["output"], found, graph.spaces[first], graph.widths[first])


def _mix(graph: _Graph, it: Mapping[str, Any]) -> None:
    name = it["inputs"][0]
    weights = graph.tensor(it["weights"]) if "weights" in it else None
    parts = weights.shape[1] if weights is not None else graph.widths[it["inputs"][1]]
    size = graph.widths[name] // parts
    experts = graph.reshape(graph.values[name], 0, 0, parts, size)
    if weights is not None:
        sums = graph.op("MatMul", graph.weight(weights, it["weights"]), experts)
        width = weights.shape[0] * size
        found = graph.reshape(sums, 0, 0, width)
    else:
        width = size
        found = graph.sum(graph.op("Mul", experts, graph.unsqueeze(graph.values[it["inputs"][1]], 3)), 2)
    graph.define(it["output"], found, graph.spaces[name], width)


def _recurrent(graph: _Graph, it: Mapping[str, Any]) -> None:
    for option in ("normalised", "zoneout_h", "zoneout_c"):
        if it.get(option):
            what = "layer_norm" if option == "normalised" else "zoneout"
            raise ValueError(f"{it['recurrences'][0]['weight_hh']}: ONNX has no recurrent operator with {what}")
    x, space, width = graph.only_input(it)
    recurrences, mode, hidden = it["recurrences"], it["mode"], it["hidden_size"]
    inputs = it.get("side_by_side", 1)
    readers = len(recurrences) // inputs
    lengths = graph.op("Cast", graph.lengths[space], to=graph.types.INT32)
    found, g = [], 0
    while g < len(recurrences):
        part = g // readers
        own = x if inputs == 1 else graph.columns(x, part * (width // inputs), width // inputs)
        flags = [each["reverse"] for each in recurrences[g : g + 2]]
        pair = flags == [False, True] and (g + 1) // readers == part
        count = 2 if pair else 1
        found.append(_one_recurrent(graph, own, lengths, recurrences[g : g + count], mode, hidden))
        g += count
    whole = found[0] if len(found) == 1 else graph.op("Concat", *found, axis=-1)
    graph.define(it["output"], whole, space, len(recurrences) * hidden)


def _one_recurrent(
    graph: _Graph, x: str, lengths: str, recurrences: Sequence[Mapping[str, Any]], mode: str, hidden: int
) -> str:
    """One ONNX operator: a direction, or two."""
    order = _GATES[mode]

    def ordered(key: str) -> list[np.ndarray]:
        blocks = [graph.tensor(each[key]) for each in recurrences]
        return [np.concatenate([np.split(block, len(order))[gate] for gate in order]) for block in blocks]

    names = [recurrences[0][key] for key in ("weight_ih", "weight_hh")]
    weights = [graph.weight(np.stack(ordered(key)), name) for key, name in zip(("weight_ih", "weight_hh"), names)]
    bias = ""
    if "bias_ih" in recurrences[0]:
        both = [np.concatenate(pair) for pair in zip(ordered("bias_ih"), ordered("bias_hh"))]
        bias = graph.weight(np.stack(both), recurrences[0]["bias_ih"])
    direction = "bidirectional" if len(recurrences) == 2 else "reverse" if recurrences[0]["reverse"] else "forward"
    attributes: dict[str, Any] = {"hidden_size": hidden, "direction": direction}
    if mode == "GRU":
        attributes["linear_before_reset"] = 1
    if mode.startswith("RNN"):
        attributes["activations"] = [mode.removeprefix("RNN_").capitalize()] * len(recurrences)
    states = graph.op(mode.partition("_")[0], x, *weights, bias, lengths, **attributes)
    return graph.reshape(graph.op("Transpose", states, perm=[0, 2, 1, 3]), 0, 0, len(recurrences) * hidden)


def _pool(graph: _Graph, it: Mapping[str, Any]) -> None:
    x, space, width = graph.only_input(it)
    lengths, mask = graph.lengths[space], graph.masks[space]
    if it["kind"] == "max":
        found = graph.op("Where", mask, x, graph.constant(-np.inf, np.float32))
        found = graph.op("ReduceMax", found, axes=[0], keepdims=0)
    elif it["kind"] == "mean":
        sums = graph.sum(graph.op("Where", mask, x, graph.constant(0.0, np.float32)), 0)
        found = graph.op("Div", sums, graph.unsqueeze(graph.op("Cast", lengths, to=graph.types.FLOAT), 1))
    else:
        found = _last(graph, x, lengths, width, it["reverse"])
    if space == "characters":
        _of_words(graph, it["output"], found, width)
    else:
        graph.define(it["output"], found, "sequences", width)


def _last(graph: _Graph, x: str, lengths: str, width: int, reverse: Sequence[bool]) -> str:
    """Of each part of the columns the last row, or the first where it reads backwards."""
    last = graph.unsqueeze(graph.op("Sub", lengths, graph.constant(1)), 0, 2)
    size = width // len(reverse)
    parts = []
    for part, backwards in enumerate(reverse):
        own = x if len(reverse) == 1 else graph.columns(x, part * size, size)
        if backwards:
            parts.append(graph.op("Gather", own, graph.constant(0)))
        else:
            places = graph.op("Expand", last, graph.constant([1, 1, size]))
            parts.append(graph.squeeze(graph.op("GatherElements", own, places, axis=0), 0))
    return parts[0] if len(parts) == 1 else graph.op("Concat", *parts, axis=-1)


def _attention_pool(graph: _Graph, it: Mapping[str, Any]) -> None:
    states, scores = it["inputs"]
    width, heads = graph.widths[states], graph.widths[scores]
    known = graph.op("Where", graph.masks["tokens"], graph.values[scores], graph.constant(-np.inf, np.float32))
    weights = graph.unsqueeze(graph.op("Softmax", known, axis=0), 3)
    # What stands at padding may be anything, and 0 times it not a number.
    real = graph.op("Where", graph.masks["tokens"], graph.values[states], graph.constant(0.0, np.float32))
    slices = graph.reshape(real, 0, 0, heads, width // heads)
    found = graph.reshape(graph.sum(graph.op("Mul", slices, weights), 0), 0, width)
    graph.define(it["output"], found, "sequences", width)


def _spread(graph: _Graph, it: Mapping[str, Any]) -> None:
    x, _, width = graph.only_input(it)
    shape = graph.op("Concat", graph.unsqueeze(graph.steps, 0), graph.batch, graph.constant([width]), axis=0)
    graph.define(it["output"], graph.op("Expand", graph.unsqueeze(x, 0), shape), "tokens", width)


def _layer_norm(graph: _Graph, it: Mapping[str, Any]) -> None:
    raise ValueError(f"{it['gain']}: ONNX has no recurrent operator with layer_norm")


_INSTRUCTIONS = {
    "activation": _activation,
    "attention_pool": _attention_pool,
    "character_cnn": _character_cnn,
    "concatenate": _concatenate,
    "gather": _gather,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "mix": _mix,
    "multiply": _multiply,
    "pool": _pool,
    "recurrent": _recurrent,
    "softmax": _softmax,
    "spread": _spread,
}


def metadata_of(program: Program, description: Mapping[str, Any]) -> dict[str, str]:
    """What is kept in an ONNX file beside the graph, as JSON: the ids' names, the labels and the description."""
    return {
        "inputs": json.dumps(program.inputs, ensure_ascii=False),
        "tasks": json.dumps([{k: t[k] for k in ("name", "decoder", "labels") if k in t} for t in program.tasks]),
        "description": json.dumps(description, ensure_ascii=False),
    }
