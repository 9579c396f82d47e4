"""Decoders on a GPU, where attention runs in plain PyTorch, beside the CPU; on the host the CPU's kernels run."""

import copy
import json

import pytest
import torch
import toy
from parity import assert_parity
from torch import nn

import pymtl
from pymtl import ops, reference
from pymtl.training.predictor import Predictor

pytestmark = pytest.mark.cuda

DECODERS = {
    "lstm, general": {},
    "two layers, dot": {"num_layers": 2, "attention": "dot", "attention_heads": 2},
    "gru, additive, tied": {"cell": "gru", "attention": "additive", "attention_heads": 4, "tied": True},
    "copying": {"copy": True},
    "copying gru": {"copy": True, "cell": "gru", "attention": "additive"},
}
every_decoder = pytest.mark.parametrize("options", DECODERS.values(), ids=DECODERS)
LENGTHS = torch.tensor([4, 7, 1, 5, 2])
C = 9


def model_with(options):
    encoder = pymtl.LSTM(12, 16, bidirectional=True, batch_first=True)
    heads = {
        "said": pymtl.DecoderHead(C, 32, embedding_dim=8, **options),
        "intent": pymtl.ClassificationHead(3),
    }
    return pymtl.MultiTaskModel(nn.Embedding(30, 12), encoder, heads)


def batch_of(options):
    tokens = torch.randint(30, (5, 7))
    copies = options.get("copy", False)
    sources = {"said": torch.randint(2, C + 2, (5, 7))} if copies else None
    said = torch.randint(1, C, (5, 4))
    said[:, 3] = 0
    said[2] = torch.tensor([0, -100, -100, -100])
    said[4] = -100
    return tokens, sources, {"said": said, "intent": torch.tensor([0, 2, 1, -100, 1])}


def to(values, device):
    return None if values is None else {name: value.to(device) for name, value in values.items()}


def stepped(model, batch, device):
    tokens, sources, targets = batch
    joint = pymtl.JointLoss({"said": 1.0, "intent": 0.5}, model.losses)
    targets = to(targets, device)
    logits = model(tokens.to(device), LENGTHS, targets=targets, sources=to(sources, device))
    loss = joint(logits, targets).total
    model.zero_grad()
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.detach() for name, p in model.named_parameters()}


@every_decoder
def test_a_training_step_is_that_of_float64(options, gpu):
    exact, batch = model_with(options), batch_of(options)
    ours = copy.deepcopy(exact).to(gpu)
    found, expected = stepped(ours, batch, gpu), stepped(exact.double(), batch, "cpu")
    for name, value in expected.items():
        error = (found[name].cpu().double() - value).abs().max()
        assert error <= 5e-5 * value.abs().max() + 1e-9, name


SEARCHES = {
    "greedy": pymtl.Search(),
    "beam": pymtl.Search(beam_size=4, nbest=3, coverage_penalty=0.2, no_repeat_ngram=2),
    "samples": pymtl.Search(sample=True, nbest=3, temperature=2.0, top_p=0.9, seed=4),
}


@every_decoder
@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_answers_are_those_of_the_cpu(search, options, gpu):
    model = model_with(options).eval()
    tokens, sources, _ = batch_of(options)
    expected = model.generate(tokens, LENGTHS, "said", search, 6, attention=True, never=[1], sources=sources)
    ours = copy.deepcopy(model).to(gpu)
    asked = {"attention": True, "never": [1], "sources": to(sources, gpu)}
    found = ours.generate(tokens.to(gpu), LENGTHS, "said", search, 6, **asked)
    for one, other in zip(found, expected, strict=True):
        assert [each.tokens for each in one] == [each.tokens for each in other]
        for a, b in zip(one, other, strict=True):
            assert a.score == pytest.approx(b.score, abs=1e-4)
            torch.testing.assert_close(torch.tensor(a.attention), torch.tensor(b.attention), rtol=1e-3, atol=1e-4)
    if sources is None:
        packed = pymtl.pack(tokens.to(gpu), LENGTHS, batch_first=True)
        again = ours.generate(packed, None, "said", search, 6, never=[1])
        assert [[each.tokens for each in one] for one in again] == [[each.tokens for each in one] for one in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("additive", [False, True], ids=["products", "additive"])
def test_attention_is_as_accurate_as_plain_pytorch_on_the_cpu(additive, dtype, real_gpu):
    lengths = torch.tensor([5, 3, 3, 1])
    sizes = torch.tensor([4, 3, 3, 1, 1])
    given = {name: torch.randn(12 if name != "query" else 9, 8, dtype=dtype) for name in ("query", "key", "value")}
    given |= {"score": torch.randn(8, dtype=dtype)} if additive else {}
    sequences = torch.randint(len(lengths), (9,))
    seed = torch.randn(9, 8, dtype=torch.float64)

    def results(function, tensors, device):
        leaves = {name: tensor.detach().to(device).requires_grad_() for name, tensor in tensors.items()}
        heads = 2
        args = (leaves["query"], leaves["key"], leaves["value"], sequences.to(device), sizes, heads)
        context, weights = function(*args, leaves.get("score"))
        grads = torch.autograd.grad(context, list(leaves.values()), seed.to(context))
        named = {f"gradient of {name}": grad for name, grad in zip(leaves, grads)}
        named |= {"context": context, "weights": weights.to(context.dtype)}
        return {name: each.detach().cpu() for name, each in named.items()}

    truth = results(reference.attend, {name: tensor.double() for name, tensor in given.items()}, "cpu")
    assert_parity(results(ops.attend, given, real_gpu), results(reference.attend, given, "cpu"), truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_decoder
def test_autocast_trains_and_generates(options, dtype, real_gpu):
    model, (tokens, sources, targets) = model_with(options).to(real_gpu), batch_of(options)
    tokens, sources, targets = tokens.to(real_gpu), to(sources, real_gpu), to(targets, real_gpu)
    joint = pymtl.JointLoss({"said": 1.0, "intent": 0.5}, model.losses)
    with torch.autocast("cuda", dtype):
        loss = joint(model(tokens, LENGTHS, targets=targets, sources=sources), targets).total
    loss.backward()
    exact = joint(model(tokens, LENGTHS, targets=targets, sources=sources), targets).total
    assert loss.item() == pytest.approx(exact.item(), rel=3e-2)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.autocast("cuda", dtype):
        found = model.eval().generate(tokens, LENGTHS, "said", max_length=4, sources=sources)
    assert all(0 <= token < C + 2 for (each,) in found for token in each.tokens)


@pytest.mark.parametrize(("wrong", "error"), [(99, IndexError), (0, ValueError)], ids=["no class", "an end inside"])
def test_wrong_targets_are_reported_late(wrong, error, real_gpu):
    model, (tokens, _, targets) = model_with({}).to(real_gpu), batch_of({})
    targets["said"][0, 1] = wrong
    model(tokens.to(real_gpu), LENGTHS, targets=to(targets, real_gpu))
    torch.cuda.synchronize()
    with pytest.raises(error, match=r"targets\['said'\]"):
        ops.raise_late_errors()


def test_a_language_model_goes_on_as_on_the_cpu(gpu):
    model = pymtl.MultiTaskModel(
        nn.Embedding(20, 8), pymtl.LSTM(8, 16, batch_first=True), {"next": pymtl.LanguageModelHead(20)}
    ).eval()
    tokens = torch.randint(2, 20, (3, 6))
    search = pymtl.Search(beam_size=3, nbest=2)
    expected = model.generate(tokens, [6, 1, 3], "next", search, 5)
    found = copy.deepcopy(model).to(gpu).generate(tokens.to(gpu), [6, 1, 3], "next", search, 5)
    assert [[each.tokens for each in one] for one in found] == [[each.tokens for each in one] for one in expected]


CHARACTERS = """
[data]
train = "train.jsonl"
valid = "train.jsonl"

[tasks.turned]
kind = "generation"
decoder_size = 32
decoder_embedding_dim = 8
beam_size = 2

[model]
embedding_dim = 8
hidden_size = 16

[training]
epochs = 2
learning_rate = 0.01
"""


@pytest.mark.parametrize("backend", ["pymtl", "reference"])
def test_a_run_answers_as_on_the_cpu(backend, tmp_path, gpu):
    pytest.importorskip("rapidfuzz")  # scores answers
    words = [list("abcdefg"[i : i + 2 + i % 3]) for i in range(5)] * 8
    records = [{"tokens": each, "turned": each[::-1]} for each in words]
    toy.write_lines(tmp_path / "train.jsonl", records)
    (tmp_path / "run.toml").write_text(CHARACTERS, encoding="utf-8")
    config = toy.configuration.load(tmp_path / "run.toml")
    toy.fitted(config, tmp_path / "run", backend, gpu.type)
    texts = [" ".join(each) for each in words[:5]]
    found, expected = (Predictor(tmp_path / "run", device).predict(texts) for device in (gpu, "cpu"))
    assert json.dumps([each["turned"] for each in found]) == json.dumps([each["turned"] for each in expected])
