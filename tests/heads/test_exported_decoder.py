"""Models with decoders as programs of torch.export: a program of the model, and one of a decoder's step."""

import pytest
import torch
from torch import nn

import pymtl
from pymtl import Search
from pymtl.decoder import copied_from
from pymtl.exported_decoder import memory_of
from pymtl.generation import generate

DECODERS = {
    "lstm": {},
    "lstm, dot, two layers and heads": {"num_layers": 2, "attention": "dot", "attention_heads": 2},
    "gru, additive, tied": {"cell": "gru", "attention": "additive", "tied": True, "attention_heads": 4},
    "copying": {"copy": True},
    "gru, dot, copying, tied, two layers": {
        "cell": "gru",
        "attention": "dot",
        "copy": True,
        "tied": True,
        "num_layers": 2,
    },
    "reads embedded tokens, and after a task": {"reads": pymtl.Reads(skip=True, after="intent")},
}
CLASSES = 7


def model_with(options):
    torch.manual_seed(5)
    layers = pymtl.LSTM(16, 32, bidirectional=True, batch_first=True)
    heads = {"said": pymtl.DecoderHead(CLASSES, 64, embedding_dim=24, **options), "intent": pymtl.ClassificationHead(3)}
    return pymtl.MultiTaskModel(nn.Embedding(20, 16), layers, heads).eval()


def program_of(model):
    batch, steps = torch.export.Dim("batch"), torch.export.Dim("steps")
    example = (torch.randint(0, 20, (4, 9)), torch.tensor([9, 2, 5, 1]))
    with torch.no_grad():
        return torch.export.export(
            model, example, dynamic_shapes={"inputs": {0: batch, 1: steps}, "lengths": {0: batch}}
        )


@pytest.mark.parametrize("options", DECODERS.values(), ids=DECODERS)
def test_a_program_and_its_step_answer_as_the_model(options):
    model = model_with(options)
    program, step = program_of(model).module(), pymtl.export_step(model.heads["said"]).module()
    for lengths in ([3, 12, 5, 1, 12, 2], [1], [4, 4]):
        tokens, lengths = torch.randint(0, 20, (len(lengths), max(lengths))), torch.tensor(lengths)
        sources = torch.randint(0, CLASSES + 2, tokens.shape) if options.get("copy") else None
        found = program(tokens, lengths)
        torch.testing.assert_close(found["intent"], model(tokens, lengths, ["intent"])["intent"])
        copied = None
        if sources is not None:
            packed = pymtl.pack(sources, lengths, batch_first=True)
            copied = copied_from(packed.data, packed.batch_sizes, CLASSES)
        memory = memory_of("said", found, step, copied)
        for search in (Search(), Search(beam_size=3, nbest=3, coverage_penalty=0.2), Search(sample=True, seed=3)):
            ours = generate(memory, search, 8, attention=True)
            known = None if sources is None else {"said": sources}
            truth = model.generate(tokens, lengths, "said", search, 8, attention=True, sources=known)
            for one, other in zip(ours, truth, strict=True):
                assert [each.tokens for each in one] == [each.tokens for each in other]
                assert [each.score for each in one] == pytest.approx([each.score for each in other], abs=1e-6)


def test_a_programs_dictionary_has_what_a_decoder_answers_from():
    model = model_with({"cell": "gru"})
    found = program_of(model).module()(torch.randint(0, 20, (3, 5)), torch.tensor([2, 5, 1]))
    shapes = {name: list(value.shape) for name, value in found.items()}
    assert shapes == {
        "said/keys": [8, 64],
        "said/values": [8, 64],
        "said/batch_sizes": [5],
        "said/places": [3],
        "said/h": [1, 3, 64],
        "intent": [3, 3],
    }
    assert found["said/places"].tolist() == [1, 0, 2]


@pytest.mark.parametrize("name", ["targets", "sources"])
def test_targets_and_sources_are_dictionaries(name):
    tokens = torch.randint(0, 20, (2, 5))
    with pytest.raises(TypeError, match=f"{name}: expected a dictionary by task, got a Tensor"):
        model_with({})(tokens, **{name: tokens})


def test_what_cannot_be_exported_is_named():
    model = model_with({})
    tokens = torch.randint(0, 20, (2, 5))
    with pytest.raises(ValueError, match=r"targets\['said'\]: expected none under torch.export"):
        torch.export.export(model, (tokens,), {"targets": {"said": torch.tensor([[1, 0], [2, 0]])}}, strict=False)
    copying = model_with({"copy": True})
    with pytest.raises(ValueError, match=r"sources\['said'\]: expected none under torch.export"):
        torch.export.export(copying, (tokens,), {"sources": {"said": tokens}}, strict=False)
    heads = {"said": pymtl.DecoderHead(CLASSES, 8), "said/h": pymtl.ClassificationHead(3)}
    clashing = pymtl.MultiTaskModel(nn.Embedding(20, 16), pymtl.LSTM(16, 8, batch_first=True), heads).eval()
    with pytest.raises(
        ValueError, match="heads: expected names that differ in the program's output, got 'said/h' twice"
    ):
        torch.export.export(clashing, (tokens,), strict=False)
    with pytest.raises(TypeError, match=r"head: expected a pymtl.DecoderHead, got ClassificationHead"):
        pymtl.export_step(model.heads["intent"])
    with pytest.raises(ValueError, match="got one that is in none"):
        pymtl.export_step(pymtl.DecoderHead(5))
    with pytest.raises(RuntimeError, match="expected a head in eval mode"):
        pymtl.export_step(model.train().heads["said"])
