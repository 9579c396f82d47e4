"""An nn.LSTM in ONNX Runtime and in OpenVINO, which pack weights beforehand: what a deployment could use instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn


def onnx_model(module: nn.LSTM) -> onnx.ModelProto:
    """The same LSTM as ONNX operators: input [T, B, I], output [T, B, D*H]."""
    directions = 2 if module.bidirectional else 1
    direction = "bidirectional" if module.bidirectional else "forward"
    nodes, constants = [], []
    current = "input"
    for layer in range(module.num_layers):
        names = [f"l{layer}{suffix}" for suffix in ("", "_reverse")[:directions]]
        weights = {
            "W": np.stack([_reordered(getattr(module, f"weight_ih_{name}")) for name in names]),
            "R": np.stack([_reordered(getattr(module, f"weight_hh_{name}")) for name in names]),
            "B": np.stack(
                [
                    np.concatenate([_reordered(getattr(module, f"bias_{kind}_{name}")) for kind in ("ih", "hh")])
                    for name in names
                ]
            ),
        }
        constants += [numpy_helper.from_array(value, f"{key}{layer}") for key, value in weights.items()]
        inputs = [current, *(f"{key}{layer}" for key in weights)]
        nodes.append(
            helper.make_node("LSTM", inputs, [f"Y{layer}"], hidden_size=module.hidden_size, direction=direction)
        )
        nodes.append(helper.make_node("Transpose", [f"Y{layer}"], [f"Z{layer}"], perm=[0, 2, 1, 3]))
        current = f"out{layer}" if layer + 1 < module.num_layers else "output"
        nodes.append(helper.make_node("Reshape", [f"Z{layer}", "shape"], [current]))
    width = directions * module.hidden_size
    constants.append(numpy_helper.from_array(np.array([0, 0, width], dtype=np.int64), "shape"))
    graph = helper.make_graph(
        nodes,
        "lstm",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["T", "B", module.input_size])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["T", "B", width])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)])
    model.ir_version = 8
    return model


def _reordered(weight: Tensor) -> np.ndarray:
    """Gates i, f, g, o in ONNX's order i, o, f, c."""
    i, f, g, o = weight.detach().float().chunk(4)
    return torch.cat([i, o, f, g]).numpy()


def onnx_runtime(module: nn.LSTM, x: Tensor, threads: int) -> Callable[[], Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        onnx_model(module).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {"input": x.numpy()}
    return lambda: session.run(None, feed)[0]


def open_vino(module: nn.LSTM, x: Tensor, threads: int) -> Callable[[], Any]:
    model = openvino.Core().read_model(onnx_model(module).SerializeToString())
    model.reshape({"input": list(x.shape)})
    compiled = openvino.compile_model(
        model,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,  # it would pin the caller's thread too, for all who come after
        },
    )
    request = compiled.create_infer_request()
    feed = x.numpy()
    return lambda: request.infer([feed], share_inputs=True, share_outputs=True)[0]
