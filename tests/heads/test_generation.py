"""The search for sequences and samples of them, against one hypothesis at a time."""

import math
from itertools import chain

import numpy as np
import pytest
import torch
from torch import nn

from pymtl import GRU, LSTM, ClassificationHead, DecoderHead, LanguageModelHead, MultiTaskModel, Search, TokenFeatures
from pymtl.generation import generate
from pymtl.sharing import SharedPrivate
from pymtl.training.reference_decoder import Decoder, PlainMemory

C, WORDS = 9, 20
SEARCHES = {
    "greedy": Search(),
    "beam": Search(beam_size=3, nbest=3),
    "no length penalty": Search(beam_size=4, nbest=2, length_penalty=0.0),
    "coverage": Search(beam_size=4, nbest=4, coverage_penalty=0.3),
    "more than there are": Search(beam_size=2 * C, nbest=2 * C),
    "no repeats": Search(beam_size=2, nbest=2, no_repeat_ngram=2, length_penalty=2.0),
    "no token twice": Search(beam_size=3, no_repeat_ngram=1),
    "one token": Search(beam_size=3, nbest=2, max_length=1),
    "a huge penalty": Search(beam_size=2, length_penalty=1e308),
}
every_search = pytest.mark.parametrize("settings", SEARCHES.values(), ids=SEARCHES)


def model_of(seed=0, dtype=torch.float64, scale=4.0, **options):
    torch.manual_seed(seed)
    embedding = nn.Embedding(WORDS, 6, dtype=dtype)
    encoder = LSTM(6, 8, bidirectional=True, batch_first=True, dtype=dtype)
    head = DecoderHead(**{"num_classes": C, "hidden_size": 8, "embedding_dim": 5, **options})
    model = MultiTaskModel(embedding, encoder, {"phones": head, "intent": ClassificationHead(2)}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)  # of sharp distributions, which end here and there
    return model


def sentences(batch=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, WORDS, (batch, 7), generator=generator), torch.randint(1, 8, (batch,), generator=generator)


def plain_memory(model, x, lengths):
    with torch.no_grad():
        output, (h, _) = model.encoder(model.embedding(x), lengths=lengths)
        decoder = Decoder(model.heads["phones"]).eval()
        return PlainMemory(decoder, decoder.read(output, lengths), decoder.first(h.transpose(0, 1).flatten(1)))


@every_search
@pytest.mark.parametrize(
    "options", [{}, {"cell": "gru", "num_layers": 2, "attention": "additive"}], ids=["lstm", "gru"]
)
def test_the_search_is_the_plain_one(settings, options):
    ended = set()
    for seed in range(8):
        model = model_of(seed, **options)
        x, lengths = sentences(seed=seed)
        with torch.no_grad():
            memory = model(x, lengths)["phones"]
        for limit in (1, 3, 9):
            ours = generate(memory, settings, limit, attention=True, never=[1])
            plain = plain_memory(model, x, lengths).generate(settings, limit, attention=True, never=[1])
            assert [len(own) for own in ours] == [len(own) for own in plain]
            assert all(ours)
            for a, b in zip(chain(*ours), chain(*plain)):
                assert (a.tokens, a.ended) == (b.tokens, b.ended)
                assert a.log_probability == pytest.approx(b.log_probability)
                assert a.score == pytest.approx(b.score)
                np.testing.assert_allclose(a.attention, b.attention, atol=1e-12)
                assert a.attention.shape[0] == len(a.tokens) + a.ended
                assert 1 not in a.tokens
                ended.add(a.ended)
    assert ended == {True, False}


def test_greedy_takes_the_likeliest_token_each_time():
    model = model_of(1)
    x, lengths = sentences()
    for i, (found,) in enumerate(model.generate(x, lengths, "phones", max_length=8)):
        tokens = []
        while True:
            y = torch.tensor([[*tokens, 0]])
            logits = model(x[i : i + 1], lengths[i : i + 1], targets={"phones": y})["phones"]
            best = int(logits[0, -1].argmax())
            if best == 0 or len(tokens) == 8:
                break
            tokens.append(best)
        assert found.tokens == tokens
        assert found.ended == (best == 0)


def test_a_wide_beam_finds_the_likeliest_of_all_sequences():
    model = model_of(3, scale=1.0, num_classes=4)
    x, lengths = sentences(3)
    settings = Search(beam_size=200, length_penalty=0.0)
    for i, (found, *_) in enumerate(model.generate(x, lengths, "phones", settings, max_length=3)):
        every = [[]]
        for _ in range(3):
            every += [[*tokens, t] for tokens in every for t in (1, 2, 3) if [*tokens, t] not in every]
        y = torch.full((len(every), 4), -100)
        for row, tokens in zip(y, every):
            row[: len(tokens) + 1] = torch.tensor([*tokens, 0])
        with torch.no_grad():
            logits = model(x[i].expand(len(every), -1), lengths[i].expand(len(every)), targets={"phones": y})["phones"]
        chances = -nn.functional.cross_entropy(logits.transpose(1, 2), y, reduction="none").sum(1)
        assert found.tokens == every[int(chances.argmax())]
        assert found.log_probability == pytest.approx(float(chances.max()))


@every_search
def test_answers_do_not_depend_on_the_batch(settings):
    model = model_of(2, torch.float32)
    x, lengths = sentences()
    whole = model.generate(x, lengths, "phones", settings, 9, attention=True)
    for i, length in enumerate(lengths.tolist()):
        (own,) = model.generate(x[i : i + 1, :length], [length], "phones", settings, 9, attention=True)
        assert own == whole[i]  # scores too, bit for bit
        assert all(np.array_equal(a.attention, b.attention) for a, b in zip(own, whole[i]))


def test_no_n_tokens_come_twice():
    model = model_of(2)
    x, lengths = sentences()
    for n in (1, 2, 3):
        for own in model.generate(x, lengths, "phones", Search(beam_size=3, nbest=3, no_repeat_ngram=n), 12):
            for found in own:
                grams = [tuple(found.tokens[i : i + n]) for i in range(len(found.tokens) - n + 1)]
                assert len(grams) == len(set(grams))


# Samples.


def distribution(model, x, lengths, tokens=()):
    """Of the token behind these, float64 [C]."""
    y = torch.tensor([[*tokens, 0]])
    with torch.no_grad():
        return model(x, lengths, targets={"phones": y})["phones"][0, -1].softmax(-1)


def drawn(model, x, lengths, **options):
    """How often each first token comes among many samples; the end is 0."""
    (found,) = model.generate(x, lengths, "phones", Search(sample=True, nbest=4000, max_length=1, **options))
    return np.bincount([each.tokens[0] if each.tokens else 0 for each in found], minlength=C) / len(found), found


def test_samples_have_the_model_s_probabilities():
    model = model_of(4, scale=2.0)
    x, lengths = sentences(1)
    expected = distribution(model, x, lengths).numpy()
    shares, found = drawn(model, x, lengths)
    assert np.abs(shares - expected).max() < 4 * math.sqrt(0.25 / 4000)
    for each in found[:50]:
        first = each.tokens[0] if each.tokens else 0
        assert each.log_probability == pytest.approx(math.log(expected[first]))


def test_temperature_top_k_and_top_p():
    model = model_of(4, scale=2.0)
    x, lengths = sentences(1)
    p = distribution(model, x, lengths).numpy()
    order = np.argsort(-p)
    sharp = p**2 / (p**2).sum()
    assert np.abs(drawn(model, x, lengths, temperature=0.5)[0] - sharp).max() < 0.04
    of_three = np.where(np.isin(np.arange(C), order[:3]), p, 0)
    assert np.abs(drawn(model, x, lengths, top_k=3)[0] - of_three / of_three.sum()).max() < 0.04
    count = int((np.cumsum(p[order]) < 0.6).sum()) + 1
    assert 1 < count < C
    nucleus = np.where(np.isin(np.arange(C), order[:count]), p, 0)
    assert np.abs(drawn(model, x, lengths, top_p=0.6)[0] - nucleus / nucleus.sum()).max() < 0.04
    assert drawn(model, x, lengths, top_p=1e-9)[0][order[0]] == 1
    assert drawn(model, x, lengths, top_k=1)[0][order[0]] == 1


def test_draws_depend_on_the_seed_and_the_sentence_s_number():
    model = model_of(4, torch.float32, scale=1.0)
    x, lengths = sentences()
    settings = Search(sample=True, nbest=3, seed=7)
    whole = model.generate(x, lengths, "phones", settings, 6)
    assert model.generate(x, lengths, "phones", settings, 6) == whole
    assert model.generate(x, lengths, "phones", Search(sample=True, nbest=3, seed=8), 6) != whole
    with torch.no_grad():
        memory = model(x[2:4], lengths[2:4])["phones"]
    assert generate(memory, settings, 6, numbers=[2, 3]) == whole[2:4]
    assert len({tuple(each.tokens) for each in whole[0]}) > 1


# Language models.


def language_model(cell=LSTM, layers=1, embedding=None, heads=None, **options):
    torch.manual_seed(0)
    encoder = cell(6, 8, layers, batch_first=True, **options)
    heads = heads or {"words": LanguageModelHead(WORDS, 7)}
    model = MultiTaskModel(embedding or nn.Embedding(WORDS, 6), encoder, heads).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    return model


@pytest.mark.parametrize(("cell", "options"), [(LSTM, {}), (GRU, {}), (LSTM, {"proj_size": 3})])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    "settings", [Search(beam_size=3, nbest=2), Search(sample=True, nbest=2)], ids=["beam", "sample"]
)
def test_a_language_model_goes_on_with_a_text(cell, options, layers, settings):
    model = language_model(cell, layers, **options)
    x, lengths = sentences()
    for i, own in enumerate(model.generate(x, lengths, search=settings, max_length=5, never=[0, 1])):
        assert len(own) == 2
        for found in own:
            text, total = x[i, : lengths[i]].tolist(), 0.0
            for token in found.tokens:
                with torch.no_grad():
                    scores = model(torch.tensor([text]))["words"][0, -1, 0].log_softmax(-1)
                total, text = total + float(scores[token]), [*text, token]
            assert len(found.tokens) == 5
            assert not found.ended
            assert found.log_probability == pytest.approx(total)
            assert not {0, 1} & set(found.tokens)


@pytest.mark.parametrize("settings", [Search(no_repeat_ngram=1), Search(no_repeat_ngram=1, sample=True)])
def test_what_is_found_is_given_where_no_token_may_follow(settings):
    model = language_model()
    found = model.generate(torch.tensor([[3, 4]]), search=settings, max_length=2 * WORDS, never=[0, 1])[0][0]
    assert sorted(found.tokens) == list(range(2, WORDS))
    assert math.isfinite(found.log_probability)


def test_token_0_is_a_word_of_a_language_model_as_others():
    model = language_model()
    with torch.no_grad():
        model.heads["words"].bias[0] = 100
    assert model.generate(torch.tensor([[3, 4]]), max_length=3)[0][0].tokens == [0, 0, 0]


def test_a_number_that_is_none_is_an_error():
    model = model_of()
    with torch.no_grad():
        model.heads["phones"].bias[3] = math.nan
    with pytest.raises(RuntimeError, match="logits: expected numbers to choose the next token by, got nan"):
        model.generate(*sentences(), "phones")


@pytest.mark.filterwarnings("error")
def test_a_tiny_temperature_takes_the_likeliest():
    model = model_of(4)
    x, lengths = sentences()
    drawn_ = model.generate(x, lengths, "phones", Search(sample=True, temperature=1e-320), 9, never=[1])
    greedy = model.generate(x, lengths, "phones", max_length=9, never=[1])
    assert [own[0].tokens for own in drawn_] == [own[0].tokens for own in greedy]


def test_generating_needs_eval_mode_and_sound_numbers():
    model = language_model()
    x = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="generate: expected a model in eval mode, got one in training"):
        model.train().generate(x)
    model.eval()
    for lengths in ([0, 3], [4, 3]):
        with pytest.raises(RuntimeError, match="lengths"):
            model.generate(x, lengths)
    with pytest.raises(ValueError, match="max_length: expected a number from 1 to 1048576, got -1"):
        model.generate(x, max_length=-1)
    with pytest.raises(ValueError, match="never: expected a number from 0 to 19, got 20"):
        model.generate(x, never=[20])
    assert model.generate(x[:0]) == []


NOT_ON = {
    "two directions": (lambda: language_model(bidirectional=True), "an encoder of one direction, got two"),
    "fields": (
        lambda: language_model(embedding=TokenFeatures({"words": nn.Embedding(WORDS, 6)})),
        "an embedding of words alone, got TokenFeatures",
    ),
    "sharing": (
        lambda: MultiTaskModel(
            nn.Embedding(WORDS, 6),
            SharedPrivate(["words", "b"], 6, 8, 1, False),
            {"words": LanguageModelHead(WORDS, 7), "b": ClassificationHead(2)},
        ).eval(),
        "an encoder that all tasks share, got SharedPrivate",
    ),
}


@pytest.mark.parametrize(("make", "message"), NOT_ON.values(), ids=NOT_ON)
def test_a_language_model_that_cannot_go_on(make, message):
    with pytest.raises(ValueError, match=message):
        make().generate(torch.ones(1, 2, dtype=torch.int64), task="words")


# What does not fit.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_size": 0}, "beam_size: expected a whole number above 0, got 0"),
        ({"beam_size": 2.5}, "beam_size: expected a whole number above 0, got 2.5"),
        ({"nbest": 0}, "nbest: expected a whole number above 0, got 0"),
        ({"beam_size": 2, "nbest": 3}, "nbest: expected at most beam_size = 2 without sampling, got 3"),
        ({"beam_size": 2, "sample": True}, r"beam_size: expected none with sampling \(nbest says how many"),
        ({"length_penalty": -1}, "length_penalty: expected a number of at least 0, got -1"),
        ({"coverage_penalty": math.nan}, "coverage_penalty: expected a number of at least 0, got nan"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram: expected a whole number of at least 0, got -1"),
        ({"max_length": 0}, "max_length: expected a whole number above 0, got 0"),
        ({"temperature": 0}, "temperature: expected a number above 0, got 0"),
        ({"top_k": -1}, "top_k: expected a whole number of at least 0, got -1"),
        ({"top_p": 0}, "top_p: expected a number above 0, at most 1, got 0"),
        ({"top_p": 1.1}, "top_p: expected a number above 0, at most 1, got 1.1"),
        ({"seed": -1}, "seed: expected a whole number of at least 0, got -1"),
    ],
)
def test_settings_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        Search(**options)


def test_several_answers_widen_a_beam_that_is_not_said():
    assert Search(nbest=4).with_beam().beam_size == 4
    assert Search(nbest=4).with_beam(6).beam_size == 6
    assert Search(nbest=4, sample=True).with_beam(6).beam_size == 1
    assert Search(beam_size=2).with_beam(6).beam_size == 2


def test_the_task_must_generate():
    model = model_of()
    x, lengths = sentences()
    assert model.generate(x, lengths) == model.generate(x, lengths, "phones")
    with pytest.raises(KeyError, match="task: unknown task 'slots'"):
        model.generate(x, lengths, "slots")
    with pytest.raises(ValueError, match="task: expected a decoder's or a language model's, got 'intent'"):
        model.generate(x, lengths, "intent")
    two = MultiTaskModel(nn.Embedding(WORDS, 6), LSTM(6, 8), {"a": DecoderHead(3), "b": DecoderHead(3)})
    with pytest.raises(ValueError, match=r"task: expected one of \['a', 'b'\], got none"):
        two.generate(x.t(), lengths)
