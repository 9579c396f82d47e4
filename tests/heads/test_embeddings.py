"""From fields of tokens to features."""

import copy

import pytest
import torch
import torch.nn.functional as F
from parity import assert_same_bits
from torch import nn
from torch.func import functional_call
from torch.nn.utils import prune

from pymtl import (
    LSTM,
    CharacterCNN,
    CharacterLSTM,
    ClassificationHead,
    MultiTaskModel,
    TokenClassificationHead,
    TokenFeatures,
    ops,
    pack,
)

CHARACTERS = 9
WORDS = [[3, 1, 4], [1], [5, 5, 2, 6, 8, 7, 3], [2, 7], [8, 1, 1, 4]]
LENGTHS = [3, 5, 1]


def words(rows, width=None):
    width = max(len(row) for row in rows) if width is None else width
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int64)


# Several fields.


def fields():
    return TokenFeatures(
        {"words": nn.Embedding(20, 4), "characters": CharacterLSTM(CHARACTERS, 3, 2), "signal": nn.Identity()}
    ).double()


def data():
    count = len(WORDS)
    return {
        "signal": torch.randn(count, 3, dtype=torch.float64),
        "words": torch.randint(20, (count,)),
        "characters": words(WORDS),
        "unused": torch.zeros(count),
    }


def test_fields_stand_side_by_side_in_the_order_they_were_named_in():
    features, given = fields(), data()
    expected = torch.cat(
        [
            features.fields["words"].weight[given["words"]],
            torch.stack([plain_lstm(features.fields["characters"], row) for row in WORDS]),
            given["signal"],
        ],
        1,
    )
    torch.testing.assert_close(features(given), expected)


def test_one_field_is_taken_as_it_is():
    x = torch.randn(4, 3)
    assert TokenFeatures({"signal": nn.Identity()})({"signal": x}) is x


def test_missing_fields_are_refused_by_name():
    with pytest.raises(ValueError, match="fields: expected at least one, got none"):
        TokenFeatures({})
    given = data()
    del given["characters"]
    with pytest.raises(KeyError, match=r"inputs: expected the field .*characters.*, got .*signal.*words"):
        fields()(given)


def test_fields_are_trained_copied_and_saved():
    features, given = fields(), data()
    features(given).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in features.parameters())
    other = fields()
    other.load_state_dict(features.state_dict())
    for twin in (other, copy.deepcopy(features)):
        assert torch.equal(twin(given), features(given))


def model_of(embedding, size):
    heads = {"slots": TokenClassificationHead(3), "a": ClassificationHead(2)}
    return MultiTaskModel(embedding, LSTM(size, 5, batch_first=True, bidirectional=True), heads).double()


def padded_fields():
    batch, steps = len(LENGTHS), max(LENGTHS)
    characters = torch.randint(1, CHARACTERS, (batch, steps, 4))
    characters[torch.rand(batch, steps, 4).sort(-1, descending=True).values < 0.4] = 0
    return {
        "words": torch.randint(20, (batch, steps)),
        "characters": characters,
        "signal": torch.randn(batch, steps, 3, dtype=torch.float64),
    }


@pytest.mark.parametrize("gradient", [True, False], ids=["training", "inference"])
def test_a_model_takes_fields_packed_or_padded(gradient):
    model, given = model_of(fields(), 11), padded_fields()
    with torch.set_grad_enabled(gradient):
        padded = model(given, LENGTHS)
        packed = model({name: pack(f, LENGTHS, batch_first=True) for name, f in given.items()})
        alone = [model({n: f[b : b + 1, :length] for n, f in given.items()}) for b, length in enumerate(LENGTHS)]
    assert_same_bits({"a": packed["a"]}, {"a": padded["a"]})
    assert torch.equal(nn.utils.rnn.pad_packed_sequence(packed["slots"], True)[0], padded["slots"])
    for b, length in enumerate(LENGTHS):
        torch.testing.assert_close(alone[b]["a"][0], padded["a"][b])
        torch.testing.assert_close(alone[b]["slots"][0], padded["slots"][b, :length])


def test_a_model_refuses_fields_that_do_not_belong_together():
    model, given = model_of(fields(), 11), padded_fields()
    packed = {name: pack(f, LENGTHS, batch_first=True) for name, f in given.items()}
    wrong = [
        ({**packed, "signal": given["signal"]}, r"inputs\['signal'\]: expected a PackedSequence like 'words'"),
        ({**given, "signal": packed["signal"]}, r"inputs\['signal'\]: expected a Tensor like 'words'"),
        ({**given, "signal": given["signal"][:, :2]}, r"inputs\['signal'\]: expected a padded batch \[3, 5\]"),
        (
            {**packed, "signal": pack(given["signal"], [5, 5, 5], batch_first=True)},
            r"inputs\['signal'\]: expected the packing of 'words'",
        ),
        ({}, "inputs: expected at least one field"),
    ]
    for inputs, message in wrong:
        with pytest.raises(ValueError, match=message):
            model(inputs)
    with pytest.raises(KeyError, match="expected the field 'signal'"):
        model({name: packed[name] for name in ("words", "characters")})


def test_a_model_refuses_fields_packed_in_another_order():
    model, given = model_of(fields(), 11), padded_fields()
    packed = {name: pack(f, LENGTHS, batch_first=True) for name, f in given.items()}
    packed["signal"] = pack(given["signal"], LENGTHS[::-1], batch_first=True)
    with pytest.raises(ValueError, match=r"inputs\['signal'\]: expected the packing of 'words'"):
        model(packed)


# Characters under an LSTM.


def plain_lstm(module, row):
    """Each word by itself through torch's own LSTM: the final states of both directions."""
    lstm = nn.LSTM(module.encoder.input_size, module.encoder.hidden_size, bidirectional=True).double()
    x = module.embedding.weight[torch.tensor(row or [0])]
    _, (h_n, _) = functional_call(lstm, dict(module.encoder.named_parameters()), x)
    return h_n.flatten()


def plain_cnn(module, row):
    """Each word by itself, filter by filter and place by place: windows of characters, zeros beyond the word."""
    x = module.embedding.weight[torch.tensor(row or [0])]
    found = []
    for convolution in module.convolutions:
        half = convolution.kernel_size[0] // 2
        windows = F.pad(x, (0, 0, half, half)).unfold(0, 2 * half + 1, 1)  # [t, E, width]
        values = torch.einsum("tew,few->tf", windows, convolution.weight) + convolution.bias
        found.append(values.amax(0))
    return torch.cat(found)


KINDS = {
    "LSTM": (lambda **o: CharacterLSTM(CHARACTERS, 3, 4, **o), plain_lstm, 8),
    "CNN": (lambda **o: CharacterCNN(CHARACTERS, 3, 4, **o), plain_cnn, 8),
    "CNN of other widths": (lambda **o: CharacterCNN(CHARACTERS, 3, 2, (1, 3, 7), **o), plain_cnn, 6),
    "CNN of one width": (lambda **o: CharacterCNN(CHARACTERS, 3, 2, [9], **o), plain_cnn, 2),
}
every_kind = pytest.mark.parametrize(("make", "plain", "size"), KINDS.values(), ids=KINDS)


@pytest.mark.parametrize("gradient", [True, False], ids=["training", "inference"])
@every_kind
def test_a_word_has_the_numbers_and_gradients_of_plain_pytorch(make, plain, size, gradient):
    module = make().double()
    rows = [*WORDS, []]
    with torch.set_grad_enabled(gradient):
        actual, expected = module(words(rows)), torch.stack([plain(module, row) for row in rows])
    assert actual.shape == (len(rows), size)
    assert module.out_features == size
    torch.testing.assert_close(actual, expected)
    if gradient:
        seed = torch.randn_like(actual)
        parameters = dict(module.named_parameters())
        found = torch.autograd.grad(actual, list(parameters.values()), seed)
        wanted = dict(zip(parameters, torch.autograd.grad(expected, list(parameters.values()), seed)))
        wanted["embedding.weight"][0] = 0.0  # no character learns nothing
        torch.testing.assert_close(dict(zip(parameters, found)), wanted)


@every_kind
def test_a_word_depends_neither_on_the_padding_nor_on_other_words(make, plain, size):
    module = make().double()
    rows = [*WORDS, []]
    expected = module(words(rows))
    for width in (8, 13, 40):
        torch.testing.assert_close(module(words(rows, width)), expected)
    for row, wanted in zip(rows, expected):
        torch.testing.assert_close(module(words([row], max(len(row), 1)))[0], wanted)
        torch.testing.assert_close(module(words([row, [1] * 20, row]))[::2], torch.stack([wanted, wanted]))
    order = [4, 0, 5, 2, 1, 3]
    torch.testing.assert_close(module(words([rows[k] for k in order])), expected[order])


@every_kind
def test_words_without_characters_are_alike_and_finite(make, plain, size):
    module = make().double()
    nothing = module(words([[], [1, 2, 3], []]))
    assert nothing.isfinite().all()
    torch.testing.assert_close(nothing[0], nothing[2])
    torch.testing.assert_close(nothing[0], module(words([[]], 4))[0])
    module(words([[], []], 3)).sum().backward()
    assert not module.embedding.weight.grad[0].any()


@every_kind
def test_no_words_give_no_features(make, plain, size):
    for width in (0, 4):
        assert make()(torch.zeros(0, width, dtype=torch.int64)).shape == (0, size)


@every_kind
def test_words_without_characters_may_have_no_width(make, plain, size):
    torch.manual_seed(0)
    module = make().double()
    torch.testing.assert_close(module(words([[], []], 0)), module(words([[], []], 3)))


@every_kind
def test_the_derivative_is_right(make, plain, size):
    module = make().double()
    given = words([*WORDS[:2], []])
    parameters = dict(module.named_parameters())

    def features(*values):
        return functional_call(module, dict(zip(parameters, values)), given)

    # Not of the embedding's row 0, whose gradient is held at 0 on purpose.
    start = [p.detach().requires_grad_(name != "embedding.weight") for name, p in parameters.items()]
    assert torch.autograd.gradcheck(features, start)


@every_kind
def test_dropout_is_for_training_only(make, plain, size):
    module = make(dropout=0.5).double()
    given = words(WORDS)
    assert not torch.equal(module(given), module(given))
    module.eval()
    torch.testing.assert_close(module(given), torch.stack([plain(module, row) for row in WORDS]))
    module.train()
    torch.manual_seed(1)
    once = module(given)
    torch.manual_seed(1)
    assert torch.equal(module(given), once)


@pytest.mark.parametrize("widths", [(2,), (3, 4), (0,), (-1,), (3, -3)], ids=str)
def test_even_widths_and_those_below_one_are_refused(widths):
    with pytest.raises(ValueError, match="kernel_sizes: expected odd widths"):
        CharacterCNN(CHARACTERS, kernel_sizes=widths)


@every_kind
def test_characters_train_in_a_model(make, plain, size):
    module = make()
    model = model_of(TokenFeatures({"characters": module}), size)
    given = {"characters": padded_fields()["characters"]}
    model(given, LENGTHS)["a"].square().sum().backward()
    assert all(p.grad.any() for p in module.parameters())


@every_kind
def test_a_word_that_comes_again_is_computed_once_and_gets_all_its_gradient(make, plain, size):
    torch.manual_seed(0)
    module = make().double()
    words = torch.tensor([[3, 4, 0], [5, 0, 0], [3, 4, 0], [6, 5, 4], [3, 4, 0]])
    seeds = torch.randn(5, module.out_features, dtype=torch.float64)
    module(words).backward(seeds)
    together = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    for word, seed in zip(words, seeds):
        module(word.unsqueeze(0)).backward(seed.unsqueeze(0))
    for grad, p in zip(together, module.parameters()):
        torch.testing.assert_close(grad, p.grad)
    assert torch.equal(module(words)[0], module(words)[4])


def test_words_whose_keys_are_equal_are_told_apart(monkeypatch):
    monkeypatch.setattr("pymtl.embeddings._multipliers", lambda width: torch.ones(width, dtype=torch.int64))
    words = torch.tensor([[1, 2], [2, 1], [1, 2], [3, 0]])  # all of key 3
    module = CharacterLSTM(9, 4, 3)
    expected = torch.cat([module(word.unsqueeze(0)) for word in words])
    torch.testing.assert_close(module(words), expected)


# The character CNN by kernels and by the convolutions themselves.


def calls_of(monkeypatch):
    """Counts the calls of the kernels."""
    calls, char_cnn = [], ops.char_cnn
    monkeypatch.setattr(ops, "char_cnn", lambda *given: calls.append(given) or char_cnn(*given))
    return calls


@pytest.mark.parametrize("alphabet", [10, 0], ids=["all characters", "those that occur"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_word_has_the_same_bits_alone_and_among_others(alphabet, dtype, monkeypatch):
    calls = calls_of(monkeypatch)
    monkeypatch.setattr(CharacterCNN, "_ALPHABET", alphabet)
    module = CharacterCNN(CHARACTERS, 30, 50).to(dtype)
    rows = [*WORDS, []]
    together = module(words(rows))
    for row, expected in zip(rows, together):
        assert torch.equal(module(words([row], max(len(row), 1)))[0], expected)
    assert len(calls) == 1 + len(rows)


def pruned(module):
    prune.l1_unstructured(module.convolutions[0], "weight", 0.5)


def hooked(module):
    module.convolutions[1].register_forward_hook(lambda convolution, inputs, output: 2 * output)


def parametrized(module):
    nn.utils.parametrizations.weight_norm(module.convolutions[0])


def replaced(module):
    module.convolutions[0] = nn.Conv1d(3, 4, 3, padding=2, dilation=2)


def without_bias(module):
    module.convolutions[0] = nn.Conv1d(3, 4, 3, padding=1, bias=False)


def in_bfloat16(module):
    module.bfloat16()


@pytest.mark.parametrize("change", [pruned, hooked, parametrized, replaced, without_bias, in_bfloat16])
def test_convolutions_that_do_more_are_called(change, monkeypatch):
    calls = calls_of(monkeypatch)
    module = CharacterCNN(CHARACTERS, 3, 4)
    change(module)
    given = words(WORDS)
    for _ in range(2):  # a weight that a hook computes is another one at each step
        output = module(given)
        output.float().sum().backward()
    for row, actual in zip(WORDS, output):
        rows = F.embedding(torch.tensor([row]), module.embedding.weight).transpose(1, 2)
        expected = torch.cat([convolution(rows).amax(2) for convolution in module.convolutions], dim=1)[0]
        torch.testing.assert_close(actual, expected)
    assert calls == []


def test_under_autocast_the_convolutions_are_autocast(monkeypatch):
    calls = calls_of(monkeypatch)
    module = CharacterCNN(CHARACTERS, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        actual = module(words(WORDS))
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), module(words(WORDS)), rtol=0.02, atol=0.02)
    assert len(calls) == 1


def test_torch_func_differentiates_and_maps_a_character_cnn():
    module = CharacterCNN(CHARACTERS, 3, 4).double()
    given = words(WORDS)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(values):
        return functional_call(module, values, given).square().sum()

    module(given).square().sum().backward()
    torch.testing.assert_close(torch.func.grad(loss)(parameters), {n: p.grad for n, p in module.named_parameters()})
    several = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}
    torch.testing.assert_close(torch.func.vmap(loss)(several)[0], loss(parameters))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int8], ids=str)
@pytest.mark.parametrize("count", [2, 500])
def test_what_are_no_ids_are_refused(dtype, count):
    module = CharacterCNN(CHARACTERS, 3, 4)
    with pytest.raises(RuntimeError, match="characters: expected int64 or int32 ids, got torch"):
        module(torch.ones(count, 3).to(dtype))
    assert module(torch.ones(count, 3, dtype=torch.int32)).shape == (count, 8)


@pytest.mark.parametrize("wrong", [-1, CHARACTERS])
def test_a_character_out_of_range_is_refused(wrong):
    for module in (CharacterCNN(CHARACTERS, 3, 4), CharacterCNN(CHARACTERS, 3, 4).bfloat16()):
        with pytest.raises(IndexError):
            module(torch.tensor([[1, wrong]]))
