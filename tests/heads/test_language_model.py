"""Language modelling beside other tasks: what is predicted, from what, and that nothing leaks."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from parity import assert_same_bits
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from pymtl import (
    LSTM,
    ClassificationHead,
    JointLoss,
    LanguageModelHead,
    MultiTaskModel,
    TokenClassificationHead,
    TokenFeatures,
    language_model_targets,
    pack,
)
from pymtl.sharing import SCHEMES, HierarchicalSharing, TaskAttention

VOCABULARY, V, E, H = 15, 12, 5, 6
LENGTHS = [3, 6, 1, 4]
B, T = len(LENGTHS), 6
VALID = torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(1)
TASKS = ("lm", "a")


def model_of(tied=False, encoder=None, bidirectional=True, layers=1, more=True):
    torch.manual_seed(1)
    embedding = nn.Embedding(VOCABULARY, E)
    heads = {"lm": LanguageModelHead(V, 7, embedding if tied else None)}
    if more:
        heads["a"] = ClassificationHead(3)
    encoder = encoder or LSTM(E, H, layers, batch_first=True, bidirectional=bidirectional)
    return MultiTaskModel(embedding, encoder, heads).double()


def tokens_of():
    return torch.randint(VOCABULARY, (B, T))


def packed(values, lengths=LENGTHS):
    return pack(values, lengths, batch_first=True)


def padded(values):
    return pad_packed_sequence(values, True)[0]


def plain(model, tokens, lengths=LENGTHS):
    """Logits [t, D, V] of each sequence, alone, through torch's own LSTM."""
    encoder, head, found = model.encoder, model.heads["lm"], []
    lstm = nn.LSTM(E, H, encoder.num_layers, bidirectional=encoder.bidirectional, dtype=torch.float64)
    output = model.embedding.weight[:V] if head._tied else head.weight
    for row, length in zip(tokens, lengths):
        states, _ = functional_call(lstm, dict(encoder.named_parameters()), model.embedding.weight[row[:length]])
        directions = []
        for d in range(2 if encoder.bidirectional else 1):
            m = torch.tanh(F.linear(states[:, d * H : (d + 1) * H], head.hidden[d].weight, head.hidden[d].bias))
            directions.append(F.linear(m, output, head.bias))
        found.append(torch.stack(directions, 1))
    return found


def plain_targets(rows, num_tokens, directions=2):
    """By loops; one list of [D] for each token of each sequence."""

    def known(token):
        return token if token < num_tokens else -100

    found = []
    for row in rows:
        pairs = []
        for t in range(len(row)):
            after = known(row[t + 1]) if t + 1 < len(row) else -100
            before = known(row[t - 1]) if t > 0 else -100
            pairs.append([after, before][:directions])
        found.append(pairs)
    return found


# Logits.


@pytest.mark.parametrize("gradient", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("encoder", [(True, 1), (False, 1), (False, 2)], ids=["both ways", "one way", "two layers"])
def test_logits_and_gradients_are_those_of_plain_pytorch(encoder, tied, gradient):
    model, tokens = model_of(tied, None, *encoder), tokens_of()
    with torch.set_grad_enabled(gradient):
        logits, expected = model(packed(tokens))["lm"], plain(model, tokens)
        whole = model(tokens, LENGTHS)["lm"]
    for row, wanted, z, length in zip(padded(logits), expected, whole, LENGTHS):
        torch.testing.assert_close(row[:length], wanted)
        torch.testing.assert_close(z[:length], wanted)
    assert whole.shape == (B, T, 2 if encoder[0] else 1, V)
    assert not whole[~VALID].any()
    if gradient:
        seeds = [torch.randn_like(z) for z in expected]
        total = sum((row[:n] * s).sum() for row, s, n in zip(padded(logits), seeds, LENGTHS))
        wanted = sum((z * s).sum() for z, s in zip(expected, seeds))
        parameters = [p for name, p in model.named_parameters() if not name.startswith("heads.a.")]
        torch.testing.assert_close(torch.autograd.grad(total, parameters), torch.autograd.grad(wanted, parameters))


def test_a_tied_head_has_no_output_weight_of_its_own_and_trains_the_embedding():
    model, tokens = model_of(tied=True), tokens_of().clamp(max=3)
    names = {name for name, _ in model.named_parameters()}
    assert "heads.lm.weight" not in names
    assert "heads.lm.weight" in dict(model_of().named_parameters())
    assert model.heads["lm"].hidden_size == E
    assert len({id(p) for p in model.parameters()}) == len(list(model.parameters()))
    model(packed(tokens))["lm"].data.sum().backward()
    used = model.embedding.weight.grad.any(1)
    assert used[:V].all()  # also of tokens that are not in the batch
    assert not used[V:].any()


def test_the_output_layers_initial_size():
    head = model_of().heads["lm"]
    assert head.weight.shape == (V, 7)
    assert not head.bias.any()
    assert [h.weight.shape for h in head.hidden] == [(7, H)] * 2


def test_an_encoder_with_projections_works():
    encoder = LSTM(E, H, proj_size=4, bidirectional=True, batch_first=True)
    model = MultiTaskModel(nn.Embedding(VOCABULARY, E), encoder, {"lm": LanguageModelHead(V)})
    assert model(tokens_of(), LENGTHS)["lm"].shape == (B, T, 2, V)


def test_an_empty_batch_gives_empty_logits():
    assert model_of()(torch.zeros(0, T).long(), [])["lm"].shape == (0, T, 2, V)


# Targets.

RAGGED = {
    "unsorted": LENGTHS,
    "of one": [1, 1, 1],
    "one of one": [1],
    "one alone": [6],
    "equal": [4, 4],
    "sorted": [6, 5, 5, 2, 1],
    "the longest last": [1, 2, 6],
}


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
def test_targets_are_the_neighbours(lengths, directions):
    tokens = torch.randint(VOCABULARY, (len(lengths), T))
    given = packed(tokens, lengths)
    targets = language_model_targets(given, V, directions)
    assert targets.data.dtype == torch.int64
    assert torch.equal(targets.batch_sizes, given.batch_sizes)
    rows, counts = pad_packed_sequence(targets, True)
    assert counts.tolist() == lengths
    expected = plain_targets([row[:n].tolist() for row, n in zip(tokens, lengths)], V, directions)
    assert [row[:n].tolist() for row, n in zip(rows, lengths)] == expected


def test_a_packed_sequence_in_its_own_order_is_taken():
    tokens = tokens_of()[torch.tensor(LENGTHS).argsort(descending=True)]
    lengths = sorted(LENGTHS, reverse=True)
    given = nn.utils.rnn.pack_padded_sequence(tokens, lengths, True)
    rows, _ = pad_packed_sequence(language_model_targets(given, V), True)
    expected = plain_targets([row[:n].tolist() for row, n in zip(tokens, lengths)], V)
    assert [row[:n].tolist() for row, n in zip(rows, lengths)] == expected


@pytest.mark.parametrize("directions", [(True, 2), (False, 1)], ids=["both ways", "one way"])
def test_the_joint_loss_is_the_mean_over_all_that_can_be_predicted(directions):
    bidirectional, count = directions
    model, tokens = model_of(bidirectional=bidirectional), tokens_of()
    given = packed(tokens)
    targets = {"lm": language_model_targets(given, V, count), "a": torch.tensor([0, -100, 2, 1])}
    logits = model(given)
    result = JointLoss({"lm": 0.3, "a": 1.0}, model.losses)(logits, targets)
    losses = []
    rows = plain_targets([row[:n].tolist() for row, n in zip(tokens, LENGTHS)], V, count)
    for z, y in zip(plain(model, tokens), rows):
        for step, pair in zip(z, y):
            losses += [-scores.log_softmax(-1)[c] for scores, c in zip(step, pair) if c != -100]
    expected = sum(losses) / len(losses)
    torch.testing.assert_close(result.per_task["lm"], expected)
    torch.testing.assert_close(result.total, 0.3 * expected + F.cross_entropy(logits["a"], targets["a"]))


# No leak.


def assert_nothing_leaks(model):
    """Changing a token changes no logits that predict it, nor any of the same direction on its other side."""
    model.eval()
    tokens = torch.randint(1, VOCABULARY, (1, T))
    before = model(tokens)["lm"][0].detach()
    for place in range(T):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 3) % VOCABULARY
        after = model(changed)["lm"][0].detach()
        difference = (after - before).abs().amax(-1) > 1e-12
        forward, backward = difference[:, 0], difference[:, 1:]
        assert not backward[place + 1 :].any()
        assert backward[: place + 1].all()  # what may read it does
        assert not forward[:place].any()
        assert forward[place:].all()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("encoder", [(True, 1), (False, 1), (False, 3)], ids=["both ways", "one way", "three layers"])
def test_a_token_never_reaches_the_logits_that_predict_it(encoder, tied):
    assert_nothing_leaks(model_of(tied, None, *encoder))


LEAKS = "expected an encoder of one layer or one direction for a language model"


@pytest.mark.parametrize("bidirectional", [True, False], ids=["both ways", "one way"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_encoder_under_any_sharing_leaks_nothing_or_is_refused(scheme, layers, bidirectional):
    torch.manual_seed(2)
    encoder = SCHEMES[scheme](TASKS, E, H, num_layers=layers, bidirectional=bidirectional)
    refused = bidirectional and ((layers == 2 and scheme != "hierarchical") or scheme == "task_attention")
    if refused:
        with pytest.raises(ValueError, match=rf"heads\['lm'\]: {LEAKS}"):
            model_of(encoder=encoder)
    else:
        assert_nothing_leaks(model_of(encoder=encoder))


def test_encoders_that_leak_are_refused():
    with pytest.raises(ValueError, match=rf"heads\['lm'\]: {LEAKS}"):
        model_of(layers=2)
    with pytest.raises(ValueError, match=LEAKS):
        model_of(encoder=HierarchicalSharing(TASKS, E, H, levels={"a": 1, "lm": 2}))
    with pytest.raises(ValueError, match=LEAKS):
        model_of(encoder=TaskAttention(TASKS, E, H))


def test_embeddings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=f"embedding: expected at least {V} tokens, got 5"):
        LanguageModelHead(V, embedding=nn.Embedding(5, E))
    for size in (0, -1, 2.0):
        with pytest.raises(ValueError, match="LanguageModelHead: expected a number of outputs above 0"):
            LanguageModelHead(size)


def test_a_head_is_of_one_size_of_states():
    head = LanguageModelHead(V)
    MultiTaskModel(None, LSTM(E, H), {"lm": head})
    MultiTaskModel(None, LSTM(E + 1, H), {"lm": head})
    with pytest.raises(ValueError, match="LanguageModelHead: expected 6 states, got 7"):
        MultiTaskModel(None, LSTM(E, H + 1), {"lm": head})


# Copies, states and training.


def assert_tied(model):
    head, weight = model.heads["lm"], model.embedding.weight
    assert head.projection()[0].data_ptr() == weight.data_ptr()
    tokens = tokens_of()
    before = model(tokens, LENGTHS)["lm"].detach()
    with torch.no_grad():
        weight.zero_()
    assert not torch.equal(model(tokens, LENGTHS)["lm"], before)
    assert (model(tokens, LENGTHS)["lm"][VALID] == head.bias).all()


@pytest.mark.parametrize(
    "twin",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.float(), lambda m: copy.deepcopy(m).float()],
    ids=["copy", "pickle", "float", "copy to float"],
)
def test_a_tied_model_stays_tied(twin):
    model = model_of(tied=True)
    tokens = tokens_of()
    before = model(tokens, LENGTHS)["lm"]
    other = twin(model)
    torch.testing.assert_close(other(tokens, LENGTHS)["lm"].double(), before, rtol=1e-4, atol=1e-4)
    if other is not model:
        kept = model.embedding.weight.clone()
        assert_tied(other)
        assert torch.equal(model.embedding.weight, kept)
    assert_tied(model)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_state_is_saved_and_loaded(tied):
    model, other, tokens = model_of(tied), model_of(tied), tokens_of()
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    other.load_state_dict(model.state_dict())
    assert_same_bits(other(tokens, LENGTHS), model(tokens, LENGTHS))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_it_learns_beside_a_task_from_packed_tokens(tied):
    torch.manual_seed(0)
    embedding = nn.Embedding(VOCABULARY, 16)
    heads = {
        "lm": LanguageModelHead(VOCABULARY, embedding=embedding if tied else None),
        "slots": TokenClassificationHead(3),
    }
    encoder = LSTM(16, 16, batch_first=True, bidirectional=True)
    model = MultiTaskModel(TokenFeatures({"words": embedding}), encoder, heads, dropout=0.1)
    # Each token is the last one and one more.
    tokens = (torch.arange(T) + torch.tensor([1, 4, 7, 2]).unsqueeze(1)) % VOCABULARY
    given = packed(tokens)
    targets = {"lm": language_model_targets(given, VOCABULARY), "slots": given._replace(data=given.data % 3)}
    joint, optimizer = JointLoss({"lm": 1.0, "slots": 1.0}, model.losses), torch.optim.Adam(model.parameters(), 0.02)
    first = None
    for _ in range(120):
        optimizer.zero_grad()
        result = joint(model({"words": given}), targets)
        result.total.backward()
        optimizer.step()
        first = first or result.per_task["lm"].item()
    assert result.per_task["lm"].item() < 0.2 * first
    logits = model.eval()({"words": given})["lm"]
    assert isinstance(logits, PackedSequence)
    wanted = targets["lm"].data
    assert (logits.data.argmax(-1) == wanted)[wanted != -100].double().mean() > 0.9
