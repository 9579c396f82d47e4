"""Tensors whose storage was freed, as sharding libraries free it: every op refuses them by name and reads no memory."""

import re

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import pymtl
from pymtl import (
    CRF,
    BinaryCrossEntropy,
    CharacterCNN,
    ClassificationHead,
    DecoderHead,
    JointLoss,
    MultiLabelHead,
    MultiTaskModel,
    RegressionHead,
    TokenClassificationHead,
)

REFUSED = "expected a tensor with memory, got one whose storage was freed"
# Lists whose tensors have names of their own.
PARTS = {"norm": ("gain_hh", "gain_c", "bias_c")}
LENGTHS = torch.tensor([4, 7, 2])
B, T, I, H = 3, 7, 5, 6


class Recorder(TorchDispatchMode):
    """Keeps the calls of this library's ops with all that they are given."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "pymtl":
            self.calls.append((function, arguments, options or {}))
        return function(*arguments, **(options or {}))


def encoders():
    x, resets = torch.randn(B, T, I, requires_grad=True), torch.rand(B, T) < 0.3
    for kind in (pymtl.LSTM, pymtl.GRU, pymtl.RNN):
        encoder = kind(I, H, bidirectional=True, batch_first=True)
        h = torch.randn(2, B, H, requires_grad=True)
        hx = (h, torch.randn(2, B, H, requires_grad=True)) if kind is pymtl.LSTM else h
        for given in ({}, {"lengths": LENGTHS}, {"resets": resets}):
            encoder(x, hx, **given)[0].sum().backward()
        with torch.no_grad():
            encoder(x, hx, lengths=LENGTHS)
            pymtl.freeze(encoder.eval())
            encoder(x, hx)
            encoder(x[:, :1], hx)
            for weights in (torch.int8, torch.bfloat16):
                pymtl.freeze(encoder, weights)
                encoder(x, hx)
        options = {"recurrent_dropout": 0.5, "zoneout": 0.1, "layer_norm": True}
        kind(I, H, batch_first=True, **options)(x)[0].sum().backward()


def models():
    heads = {
        "intent": ClassificationHead(4),
        "slots": TokenClassificationHead(3),
        "tags": MultiLabelHead(3, "max", BinaryCrossEntropy(weight=(1.0, 2.0, 0.5))),
        "score": RegressionHead(1, "mean"),
    }
    heads["topic"] = ClassificationHead(2, "attention")
    heads["phones"] = DecoderHead(4, 6, attention="additive")
    model = MultiTaskModel(nn.Embedding(9, I), pymtl.LSTM(I, H, batch_first=True), heads, dropout=0.3)
    joint = JointLoss(dict.fromkeys(heads, 1.0), model.losses)
    tokens = torch.randint(9, (B, T))
    targets = {
        "intent": torch.randint(4, (B,)),
        "topic": torch.randint(2, (B,)),
        "slots": torch.randint(3, (B, T)),
        "tags": torch.rand(B, 3),
        "score": torch.randn(B, 1),
        "phones": torch.tensor([[2, 3, 0], [1, 0, -100], [0, -100, -100]]),
    }
    joint(model(tokens, LENGTHS, targets=targets), targets).total.backward()
    with torch.no_grad():
        model.eval()(tokens, LENGTHS)
        model(tokens, LENGTHS, ["intent", "slots", "tags", "score"])  # heads within the encoder's time loop


def words():
    module = CharacterCNN(9, 3, 4)
    module(torch.randint(9, (B, T))).sum().backward()


def chains():
    crf, emissions = CRF(4, batch_first=True), torch.randn(B, T, 4, requires_grad=True)
    crf(emissions, torch.randint(4, (B, T)), LENGTHS).sum().backward()
    crf.decode(emissions, LENGTHS)


@pytest.fixture(scope="module")
def calls():
    """The first call of each op with each set of tensors that are given at all."""
    torch.manual_seed(0)
    with Recorder() as recorder:
        for run in (encoders, models, words, chains):
            run()
    found = {}
    for function, arguments, options in recorder.calls:
        leaves, _ = tree_flatten((arguments, options))
        given = tuple(isinstance(leaf, torch.Tensor) and leaf.numel() > 0 for leaf in leaves)
        found.setdefault((function.name(), given), (function, arguments, options))
    return found


OF_GPUS = {"cluster_rounds", "rnn_choices", "rnn_force_choice", "rnn_hidden_size_limit"}
OPS = sorted(
    {
        name.removeprefix("pymtl::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("pymtl::")
    }
    - OF_GPUS
    - {"rnn_frozen_of"}  # compares the addresses of parameters, and hands the rest on to rnn_frozen
)


def freed(tensor, kind):
    """The same sizes without the memory."""
    if kind == "view":  # of a buffer, behind its beginning
        buffer = tensor.new_zeros(tensor.numel() + 3)
        result = buffer[3:].view(tensor.shape)
    else:
        result = buffer = tensor.detach().clone(memory_format=torch.contiguous_format)
    buffer.untyped_storage().resize_(0 if kind != "smaller" else buffer.untyped_storage().nbytes() // 2)
    return result


@pytest.mark.parametrize("kind", ["whole", "view", "smaller"])
@pytest.mark.parametrize("name", OPS)
def test_freed_tensors_are_refused_by_name(calls, name, kind):
    refused = 0
    for (own, _), (function, arguments, options) in calls.items():
        if own != f"pymtl::{name}":
            continue
        assert not options
        for place, argument in enumerate(function._schema.arguments[: len(arguments)]):
            for index, leaf in enumerate(
                arguments[place] if isinstance(arguments[place], list) else [arguments[place]]
            ):
                if not isinstance(leaf, torch.Tensor) or leaf.numel() == 0:
                    continue
                changed, said = freed(leaf, kind), argument.name
                if isinstance(arguments[place], list):
                    changed, said = [*arguments[place]], f"{argument.name}[{index}]"
                    changed[index] = freed(leaf, kind)
                given = [*arguments[:place], changed, *arguments[place + 1 :]]
                with torch.no_grad(), pytest.raises(RuntimeError) as raised:
                    function(*given)
                name_of = re.match(r"(\w+)(?:\[\d+\])?: " + REFUSED, str(raised.value))
                assert name_of is not None, str(raised.value)
                assert said == str(raised.value).partition(":")[0] or name_of[1] in PARTS.get(argument.name, ())
                refused += 1
    assert refused > 0
