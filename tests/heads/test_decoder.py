"""The decoder head, against what one writes in plain PyTorch."""

import copy
import pickle

import pytest
import torch
from parity import assert_parity, assert_same_bits
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

import pymtl
from pymtl import (
    GRU,
    LSTM,
    Attention,
    ClassificationHead,
    CrossEntropy,
    DecoderHead,
    JointLoss,
    LanguageModelHead,
    MultiTaskModel,
    Reads,
    Search,
)
from pymtl.decoder import Memory, packed_targets, read_before
from pymtl.training.reference_decoder import Decoder

C, E, H = 7, 5, 6  # classes, the encoder's input, its units
KINDS = {
    "general": {},
    "dot": {"hidden_size": 2 * H, "attention": "dot"},
    "additive": {"attention": "additive"},
    "heads": {"attention_heads": 2},
    "additive heads": {"attention": "additive", "attention_heads": 4},
    "tied": {"tied": True},
    "layers": {"num_layers": 2},
    "gru": {"cell": "gru", "num_layers": 2},
    "one class": {"num_classes": 1},
}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
TARGETS = {
    "ragged": ([3, 5, 1, 4], [[3, 4, 0], [1, 0], [5, 2, 6, 0], [0]]),
    "one sequence": ([4], [[2, 2, 0]]),
    "one token": ([1], [[0]]),
    "equal": ([2, 2], [[1, 0], [2, 0]]),
    "some without a label": ([2, 6, 3], [[], [4, 0], []]),
    "none with a label": ([2, 1], [[], []]),
}
every_batch = pytest.mark.parametrize("batch", TARGETS.values(), ids=TARGETS)


def head_of(options, **further):
    return DecoderHead(**{"num_classes": C, "hidden_size": 8, "embedding_dim": 4, **options, **further})


def model_of(options, dtype=torch.float64, **further):
    torch.manual_seed(1)
    encoder = LSTM(E, H, bidirectional=True, batch_first=True, dtype=dtype)
    model = MultiTaskModel(None, encoder, {"phones": head_of(options)} | further)
    return model.to(dtype)


def inputs_of(batch, classes=C, dtype=torch.float64):
    lengths, targets = batch
    torch.manual_seed(2)
    x = torch.randn(len(lengths), max(lengths), E, dtype=dtype)
    width = max(1, *map(len, targets))
    y = torch.full((len(targets), width), -100)
    for row, own in zip(y, targets):
        known = [token for token in own if token < classes]
        row[: len(known)] = torch.tensor(known, dtype=torch.int64)
    return x, torch.tensor(lengths), y


def plain_logits(model, x, lengths, y):
    """What someone writes without this library, from the encoder's states on."""
    output, (h, _) = model.encoder(x, lengths=lengths)
    decoder = Decoder(model.heads["phones"])
    decoder.load_state_dict(model.heads["phones"].state_dict())
    last = h.transpose(0, 1).flatten(1)
    return decoder, decoder(output, lengths, last, y), [output, last]


def results(logits, leaves, y):
    known = y != -100
    values = logits[known]
    seed = torch.randn(values.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(values.dtype)
    grads = torch.autograd.grad(values, list(leaves.values()), seed, allow_unused=True)
    found = {name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in zip(leaves.items(), grads)}
    return {"logits": values.detach(), **found}


@every_kind
@every_batch
def test_it_computes_what_plain_pytorch_does(options, batch):
    model = model_of(options)
    x, lengths, y = inputs_of(batch, model.heads["phones"].out_features)
    decoder, expected, _ = plain_logits(model, x, lengths, y)
    ours = results(
        model(x, lengths, targets={"phones": y})["phones"], dict(model.heads["phones"].named_parameters()), y
    )
    torch.testing.assert_close(ours, results(expected, dict(decoder.named_parameters()), y))


@every_kind
def test_float32_keeps_the_rule(options):
    batch = TARGETS["ragged"]
    model = model_of(options, torch.float32)
    x, lengths, y = inputs_of(batch, model.heads["phones"].out_features, torch.float32)
    exact = copy.deepcopy(model).double()
    found = []
    for each, own in ((model, x), (exact, x.double())):
        decoder, logits, _ = plain_logits(each, own, lengths, y)
        found.append(results(logits, dict(decoder.named_parameters()), y))
    ours = model(x, lengths, targets={"phones": y})["phones"]
    assert_parity(results(ours, dict(model.heads["phones"].named_parameters()), y), *found)


@pytest.mark.parametrize("options", [KINDS["heads"], KINDS["additive"], KINDS["gru"]], ids=["lstm", "additive", "gru"])
def test_its_derivatives_pass_gradcheck(options):
    model = model_of(options)
    x, lengths, y = inputs_of(TARGETS["ragged"])
    head = model.heads["phones"]

    def loss(features, *parameters):
        named = dict(zip(dict(head.named_parameters(prefix="heads.phones")), parameters))
        return torch.func.functional_call(model, named, (features, lengths), {"targets": {"phones": y}})["phones"]

    leaves = [p.detach().requires_grad_() for p in head.parameters()]
    assert torch.autograd.gradcheck(loss, (x.requires_grad_(), *leaves), fast_mode=True)


def test_targets_may_be_padded_or_packed():
    model = model_of({})
    x, lengths, y = inputs_of(TARGETS["ragged"])
    padded = model(x, lengths, targets={"phones": y})["phones"]
    assert padded.shape == (*y.shape, C)
    assert (padded[y == -100] == 0).all()
    packed = packed_targets(y)
    for inputs in ((x, lengths), (pymtl.pack(x, lengths, batch_first=True),)):
        found = model(*inputs, targets={"phones": packed})["phones"]
        assert isinstance(found, PackedSequence)
        assert torch.equal(pad_packed_sequence(found, batch_first=True)[0], padded)
        assert torch.equal(model(*inputs, targets={"phones": y})["phones"], padded)


def test_a_batch_s_order_does_not_matter():
    model = model_of({})
    x, lengths, y = inputs_of(TARGETS["ragged"])
    order = torch.tensor([2, 0, 3, 1])
    whole = model(x, lengths, targets={"phones": y})["phones"]
    torch.testing.assert_close(model(x[order], lengths[order], targets={"phones": y[order]})["phones"], whole[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_kind
def test_a_sequence_has_the_same_bits_in_any_batch(options, dtype):
    model = model_of(options, dtype).eval()
    x, lengths, y = inputs_of(
        ([5, 3, 9, 1, 7, 4], [[3, 4, 0], [1, 0], [5, 2, 6, 6, 1, 0], [0], [1, 0], [2, 0]]),
        model.heads["phones"].out_features,
        dtype,
    )
    with torch.no_grad():
        whole = model(x, lengths, targets={"phones": y})["phones"]
        for i, length in enumerate(lengths.tolist()):
            count = int((y[i] != -100).sum())
            own = model(x[i : i + 1, :length], [length], targets={"phones": y[i : i + 1, :count]})["phones"]
            assert_same_bits({"logits": own[0]}, {"logits": whole[i, :count]})


def test_no_token_is_read_before_it_is_written():
    model = model_of({"num_layers": 2})
    x, lengths, y = inputs_of(TARGETS["ragged"])
    other = y.clone()
    other[2, 2] = 1
    a, b = (model(x, lengths, targets={"phones": each})["phones"] for each in (y, other))
    assert torch.equal(a[:, :3], b[:, :3])
    assert not torch.equal(a[2, 3], b[2, 3])


def test_steps_give_what_the_whole_target_does():
    model = model_of({"num_layers": 2, "attention_heads": 2})
    x, lengths, y = inputs_of(TARGETS["ragged"])
    with torch.no_grad():
        logits = model(x, lengths, targets={"phones": y})["phones"]
        memory = model(x, lengths)["phones"]
        assert isinstance(memory, Memory)
        assert torch.equal(memory.lengths(), lengths)
        state = tuple(each.index_select(1, memory.places) for each in memory.initial)
        tokens = torch.zeros(len(y), dtype=torch.int64)
        for i in range(y.shape[1]):
            step, state, weights = memory.step(tokens, state, memory.attended, memory.places)
            known = y[:, i] != -100
            torch.testing.assert_close(step[known], logits[known, i])
            torch.testing.assert_close(weights.sum(-1), torch.ones(len(y), 2, dtype=torch.float64))
            tokens = y[:, i].clamp(min=0)


def test_what_is_read_before_each_token():
    targets = packed_targets(torch.tensor([[3, 0, -100], [5, 6, 0], [-100, -100, -100]]))
    padded, _ = pad_packed_sequence(targets._replace(data=read_before(targets)), batch_first=True)
    assert padded.tolist() == [[0, 3, 0], [0, 5, 6], [0, 0, 0]]


def test_a_loss_of_several_tasks_has_no_part_of_what_has_no_label():
    model = model_of({}, intent=ClassificationHead(3))
    joint = JointLoss({"phones": 0.5, "intent": 0.5}, model.losses)
    x, lengths, y = inputs_of(TARGETS["ragged"])
    targets = {"phones": y, "intent": torch.tensor([0, 2, -100, 1])}
    whole = joint(model(x, lengths, targets=targets), targets)
    assert whole.per_task["phones"] > 0
    nothing = {"phones": torch.full_like(y, -100), "intent": targets["intent"]}
    alone = joint(model(x, lengths, targets=nothing), nothing)
    assert alone.per_task["phones"] == 0
    assert torch.equal(alone.per_task["intent"], whole.per_task["intent"])
    # One sequence without a label changes nothing for the others.
    part = {"phones": y.clone()}
    part["phones"][0] = -100
    others = {"phones": y[1:]}
    a = joint(model(x, lengths, targets=part), part).per_task["phones"]
    b = joint(model(x[1:], lengths[1:], targets=others), others).per_task["phones"]
    torch.testing.assert_close(a, b)


def test_label_smoothing_is_torch_s():
    model = model_of({"loss": CrossEntropy(label_smoothing=0.1)})
    x, lengths, y = inputs_of(TARGETS["ragged"])
    logits = model(x, lengths, targets={"phones": y})["phones"]
    joint = JointLoss({"phones": 1.0}, model.losses)
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(joint({"phones": logits}, {"phones": y}).total, expected)


def test_a_head_may_read_the_embedding_and_another_task():
    model = model_of({"reads": Reads(skip=True, after="intent")}, intent=ClassificationHead(3))
    assert model.heads["phones"].in_features == 2 * H + E + 32
    x, lengths, y = inputs_of(TARGETS["ragged"])
    model(x, lengths, targets={"phones": y})["phones"].sum().backward()
    assert model.heads["intent"].weight.grad.abs().max() > 0


def test_dropout_is_of_training_alone():
    model = model_of({"dropout": 0.5})
    x, lengths, y = inputs_of(TARGETS["ragged"])
    a, b = (model(x, lengths, targets={"phones": y})["phones"] for _ in range(2))
    assert not torch.equal(a, b)
    model.eval()
    a, b = (model(x, lengths, targets={"phones": y})["phones"] for _ in range(2))
    assert torch.equal(a, b)


@every_kind
def test_state_copy_and_pickle(options):
    model, other = model_of(options), model_of(options)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(model.state_dict())
    x, lengths, y = inputs_of(TARGETS["ragged"], model.heads["phones"].out_features)
    expected = model(x, lengths, targets={"phones": y})["phones"]
    for same in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(same(x, lengths, targets={"phones": y})["phones"], expected)


def test_a_frozen_model_and_bfloat16_run():
    model = model_of({}, torch.float32).eval()
    x, lengths, y = inputs_of(TARGETS["ragged"], dtype=torch.float32)
    with torch.no_grad():
        expected = model(x, lengths, targets={"phones": y})["phones"]
        frozen = pymtl.freeze(copy.deepcopy(model))
        assert torch.equal(frozen(x, lengths, targets={"phones": y})["phones"], expected)
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(x, lengths, targets={"phones": y})["phones"]
    torch.testing.assert_close(cast.float(), expected, rtol=0.05, atol=0.05)


BAD = {
    "cell": ({"cell": "rnn"}, r"cell: expected one of \('lstm', 'gru'\), got 'rnn'"),
    "attention": ({"attention": "none"}, r"attention: expected one of .*, got 'none'"),
    "dropout": ({"dropout": 1.5}, "dropout: expected a number from 0 to 1, got 1.5"),
    "hidden_size": ({"hidden_size": 0}, "hidden_size: expected a number above 0, got 0"),
    "num_layers": ({"num_layers": -1}, "num_layers: expected a number above 0, got -1"),
    "embedding_dim": ({"embedding_dim": 0}, "embedding_dim: expected a number above 0, got 0"),
    "classes": ({"num_classes": 0}, "expected a number of outputs above 0, got 0"),
    "attention_heads": ({"attention_heads": 2.0}, "attention_heads: expected a number above 0, got 2.0"),
    "ignore_index": (
        {"loss": CrossEntropy(ignore_index=0)},
        "loss.ignore_index: expected none of the 7 classes, got 0",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        head_of(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "dot"}, r"attention: .* a decoder of 8 units and states of 12 features, got 'dot'"),
        ({"attention_heads": 3}, "attention_heads: expected a divisor of 8, got 3"),
        ({"attention_heads": 8}, "attention_heads: expected a divisor of 12, got 8"),
    ],
)
def test_sizes_that_the_model_knows(options, message):
    with pytest.raises(ValueError, match=rf"heads\['phones'\]: {message}"):
        model_of(options)


def test_a_decoder_s_loss_is_of_classes():
    with pytest.raises(TypeError, match=r"loss: expected a pymtl.CrossEntropy, got MeanSquaredError"):
        head_of({"loss": pymtl.MeanSquaredError()})


def test_an_empty_batch():
    model = model_of({})
    x, y = torch.randn(0, 3, E, dtype=torch.float64), torch.zeros(0, 4, dtype=torch.int64)
    lengths = torch.zeros(0, dtype=torch.int64)
    assert model(x, lengths, targets={"phones": y})["phones"].shape == (0, 4, C)
    assert model.eval().generate(x, lengths) == []


def test_attention_checks_its_score():
    with pytest.raises(ValueError, match=r"score: expected one of .*, got 'cosine'"):
        Attention(4, 4, "cosine")


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (torch.zeros(4), TypeError, r"targets\['phones'\]: expected int64 tokens \[B, S\], got 1-D torch.float32"),
        (torch.tensor([[1, 0]] * 3), ValueError, r"targets\['phones'\]: expected 4 sequences, got 3"),
        (torch.tensor([[-100, 1]] * 4), ValueError, r"targets\['phones'\]: expected tokens first and -100 behind them"),
        (torch.full((4, 2), C), IndexError, r"targets\['phones'\]: Target 7 is out of bounds"),
        (torch.full((4, 2), -3), IndexError, r"targets\['phones'\]: Target -3 is out of bounds"),
        (
            torch.tensor([[3, 0], [0, -100], [-100, -100], [2, 4]]),
            ValueError,
            r"targets\['phones'\]: expected class 0 at the end of each sequence and nowhere else, got 4 there",
        ),
        (
            torch.tensor([[3, 0, -100], [0, 0, -100], [0, -100, -100], [2, 3, 0]]),
            ValueError,
            r"targets\['phones'\]: expected class 0 at the end of each sequence and nowhere else, got 0 before it",
        ),
        (
            torch.zeros(4, 2, dtype=torch.int32),
            TypeError,
            r"targets\['phones'\]: expected int64 tokens \[B, S\], got 2-D",
        ),
        ([[0]] * 4, TypeError, r"targets\['phones'\]: expected int64 tokens \[B, S\], got a list"),
        (pymtl.pack(torch.zeros(4, 2, 1), [2, 1, 1, 2], batch_first=True), TypeError, r"tokens \[N\], packed, got 2-D"),
    ],
)
def test_targets_that_do_not_fit(targets, error, message):
    model = model_of({})
    x, lengths, _ = inputs_of(TARGETS["ragged"])
    joint = JointLoss({"phones": 1.0}, model.losses)
    with pytest.raises(error, match=message):
        joint(model(x, lengths, targets={"phones": targets}), {"phones": targets})


def test_a_loss_wants_logits():
    model = model_of({})
    x, lengths, y = inputs_of(TARGETS["ragged"])
    with pytest.raises(TypeError, match=r"logits\['phones'\]: .*targets"):
        JointLoss({"phones": 1.0}, model.losses)(model(x, lengths), {"phones": y})


@pytest.mark.parametrize("after", [DecoderHead(3), LanguageModelHead(3)], ids=["decoder", "language model"])
def test_no_head_reads_after_a_decoder(after):
    with pytest.raises(ValueError, match="expected another than a language model or a decoder"):
        MultiTaskModel(None, GRU(E, H), {"a": after, "b": ClassificationHead(2, reads=Reads(after="a"))})


def test_targets_without_a_step():
    model = model_of({})
    x, lengths, _ = inputs_of(TARGETS["ragged"])
    empty = torch.zeros(4, 0, dtype=torch.int64)
    assert model(x, lengths, targets={"phones": empty})["phones"].shape == (4, 0, C)


# Copying.

SOURCES = torch.tensor([[3, 7, 3, 0, 0], [7, 8, 9, 2, 7], [7, 0, 0, 0, 0], [1, 1, 2, 7, 0]])  # 7 and on: no class


def copying(dtype=torch.float64, **options):
    return model_of({"copy": True, **options}, dtype)


def copied_inputs(dtype=torch.float64):
    x, lengths, y = inputs_of(TARGETS["ragged"], dtype=dtype)
    y[0, 1], y[2, 1:3] = 7, torch.tensor([7, 7])
    return x, lengths, y


@pytest.mark.parametrize("heads", [1, 2])
def test_a_token_is_written_or_copied(heads):
    model = copying(attention_heads=heads)
    head = model.heads["phones"]
    x, lengths, y = copied_inputs()
    logits = model(x, lengths, targets={"phones": y}, sources={"phones": SOURCES})["phones"]
    assert logits.shape == (4, 4, 10)
    with torch.no_grad():
        memory = model(x, lengths, sources={"phones": SOURCES})["phones"]
        state = tuple(each.index_select(1, memory.places) for each in memory.initial)
        read = torch.zeros(4, dtype=torch.int64)
        for i in range(4):
            embedded = head.embedding(torch.where(read < C, read, 1))
            h, state = head.recurrence(embedded.unsqueeze(0), state)
            context, weights = head.reader(h[0], memory.attended, memory.places)
            both = torch.cat([h[0], context], 1)
            written = nn.functional.linear(torch.tanh(head.combine(both)), head.weight, head.bias).softmax(-1)
            gate = torch.sigmoid(head.switch(torch.cat([both, embedded], 1)))
            for b in range(4):
                chances = torch.zeros(10, dtype=torch.float64)
                chances[:C] = gate[b] * written[b]
                for t in range(int(lengths[b])):
                    chances[SOURCES[b, t]] += (1 - gate[b, 0]) * weights[b, :, t].mean()
                assert chances.sum() == pytest.approx(1)
                if y[b, i] != -100:
                    torch.testing.assert_close(logits[b, i].exp(), chances, rtol=1e-9, atol=1e-10)
            read = y[:, i].clamp(min=0)
    loss = JointLoss({"phones": 1.0}, model.losses)({"phones": logits}, {"phones": y}).total
    known = y != -100
    torch.testing.assert_close(loss, -logits[known].gather(1, y[known].unsqueeze(1)).mean())
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert head.switch.weight.grad.abs().max() > 0


def test_copying_passes_gradcheck():
    model = copying()
    x, lengths, y = copied_inputs()
    call = lambda x: model(x, lengths, targets={"phones": y}, sources={"phones": SOURCES})["phones"].exp()  # noqa: E731
    assert torch.autograd.gradcheck(call, (x.requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sequence_that_is_copied_from_has_the_same_numbers_in_any_batch(dtype):
    model = copying(dtype).eval()
    x, lengths, y = copied_inputs(dtype)
    with torch.no_grad():
        whole = model(x, lengths, targets={"phones": y}, sources={"phones": SOURCES})["phones"]
        found = model.generate(x, lengths, max_length=5, sources={"phones": SOURCES})
        for i, length in enumerate(lengths.tolist()):
            count = int((y[i] != -100).sum())
            sources = {"phones": SOURCES[i : i + 1, :length]}
            given = (x[i : i + 1, :length], [length])
            own = model(*given, targets={"phones": y[i : i + 1, :count]}, sources=sources)["phones"]
            torch.testing.assert_close(own[0], whole[i, :count, : own.shape[2]])
            assert model.generate(*given, max_length=5, sources=sources)[0][0].tokens == found[i][0].tokens


@pytest.mark.parametrize(
    "search",
    [
        Search(beam_size=40, nbest=40, max_length=2),
        Search(sample=True, temperature=100.0, nbest=40, max_length=4),
    ],
    ids=["beam", "samples"],
)
def test_no_token_of_another_sequence_is_copied(search):
    """However many answers are asked for, and however unlikely they are."""
    model = copying().eval()
    x, lengths, _ = copied_inputs()
    found = model.generate(x, lengths, sources={"phones": SOURCES}, search=search)
    for own, count in zip(found, [C + 1, C + 3, C + 1, C + 1]):
        assert max(max(each.tokens, default=0) for each in own) == count - 1
    first = {"phones": SOURCES[:1, : lengths[0]]}
    (alone,) = model.generate(x[:1, : lengths[0]], lengths[:1], sources=first, search=search)
    assert [each.tokens for each in alone] == [each.tokens for each in found[0]]


def test_sources_may_be_packed():
    model = copying()
    x, lengths, y = copied_inputs()
    padded = model(x, lengths, targets={"phones": y}, sources={"phones": SOURCES})["phones"]
    given, sources = (pymtl.pack(each, lengths, batch_first=True) for each in (x, SOURCES))
    assert torch.equal(model(given, targets={"phones": y}, sources={"phones": sources})["phones"], padded)


@pytest.mark.parametrize(
    ("sources", "error", "message"),
    [
        ({}, ValueError, "sources: expected those of 'phones', which copies"),
        ({"phones": SOURCES[:, :4]}, ValueError, r"sources\['phones'\]: expected the layout of the input"),
        ({"phones": SOURCES.float()}, TypeError, "sources: expected one int64 a token, got 1-D torch.float32"),
        ({"phones": SOURCES - 2}, ValueError, "sources: expected classes, got -1"),
        (
            {"phones": pymtl.pack(SOURCES, [3, 5, 1, 4], batch_first=True)},
            ValueError,
            r"sources\['phones'\]: expected a Tensor like the input",
        ),
    ],
)
def test_sources_that_do_not_fit(sources, error, message):
    model = copying()
    x, lengths, _ = copied_inputs()
    with pytest.raises(error, match=message):
        model(x, lengths, sources=sources)


def test_a_copied_token_that_is_not_in_the_text_is_refused_by_the_loss():
    model = copying()
    x, lengths, y = copied_inputs()
    y[0, 0] = 10
    logits = model(x, lengths, targets={"phones": y}, sources={"phones": SOURCES})
    with pytest.raises(IndexError, match="got 10 at row 0, out of bounds"):
        JointLoss({"phones": 1.0}, model.losses)(logits, {"phones": y})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": CrossEntropy(label_smoothing=0.1)}, "loss: expected neither label_smoothing nor weight with copy"),
        ({"unknown": 7}, "unknown: expected one of 7 classes, got 7"),
    ],
)
def test_options_of_copying_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        copying(**options)
