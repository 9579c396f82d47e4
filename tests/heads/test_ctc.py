"""Labels without their places: the loss, its head and both decoders."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from pymtl import (
    LSTM,
    ClassificationHead,
    CTCHead,
    CTCLoss,
    JointLoss,
    MultiTaskModel,
    TokenClassificationHead,
    ctc_beam,
    ctc_greedy,
    pack,
)

LENGTHS = [3, 6, 1, 4, 5]
LABELS = [[2, 1], [3, 3, 1], [1], [], [4, 1, 2]]
B, T, C = len(LENGTHS), 6, 5


def filled(labels, width=4, value=-100):
    rows = [torch.tensor(row + [value] * (width - len(row)), dtype=torch.int64) for row in labels]
    return torch.stack(rows) if rows else torch.zeros(0, width, dtype=torch.int64)


def sample(dtype=torch.float64):
    return torch.randn(B, T, C, dtype=dtype)


def merged(path):
    """Repeats merged, blanks left out."""
    return tuple(c for c, _ in itertools.groupby(path) if c != 0)


def by_enumeration(logits):
    """The probability of each label sequence: of all paths that merge to it."""
    probabilities = {}
    rows = logits.softmax(-1).tolist()
    for path in itertools.product(range(len(rows[0])), repeat=len(rows)):
        probability = math.prod(row[c] for row, c in zip(rows, path))
        probabilities[merged(path)] = probabilities.get(merged(path), 0.0) + probability
    return probabilities


def torchs(logits, labels, lengths=LENGTHS):
    """torch's loss of each labelled sequence alone, over its number of labels; the mean of those."""
    losses = []
    for z, row, length in zip(logits, labels, lengths):
        if row:
            scores = z[:length].log_softmax(-1)
            loss = F.ctc_loss(
                scores, torch.tensor(row), torch.tensor(length), torch.tensor(len(row)), 0, "none", zero_infinity=True
            )
            losses.append(loss / len(row))
    return sum(losses) / len(losses)


def loss_of(logits, labels, lengths=LENGTHS, loss=None, **options):
    z = logits if lengths is None else pack(logits, lengths, batch_first=True)
    joint = JointLoss({"c": 1.0}, {"c": loss or CTCLoss()})
    return joint({"c": z}, {"c": filled(labels, **options)}).total


@pytest.mark.parametrize("width", [3, 4, 9])
def test_the_loss_and_its_gradient_are_those_of_each_sequence_alone(width):
    logits = sample().requires_grad_()
    mine = logits.detach().clone().requires_grad_()
    value, expected = loss_of(logits, LABELS, width=width), torchs(mine, LABELS)
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad, mine.grad)
    assert not logits.grad[3].any()  # without labels
    assert logits.grad[4].any()


def test_the_loss_and_its_gradient_are_those_of_padded_logits_at_once():
    logits = sample().requires_grad_()
    rows = [0, 1, 2, 4]
    expected = F.ctc_loss(
        logits.transpose(0, 1).log_softmax(-1)[:, rows],
        torch.tensor([c for row in LABELS for c in row]),
        torch.tensor(LENGTHS)[rows],
        torch.tensor([len(row) for row in LABELS if row]),
    )
    value = loss_of(logits, LABELS)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (value, expected)))


def test_the_loss_is_the_probability_of_all_paths():
    logits = torch.randn(1, 5, 4, dtype=torch.float64)
    for labels in ([1], [2, 3], [1, 1], [3, 1, 3], [1, 2, 3, 1, 2]):
        probability = by_enumeration(logits[0])[tuple(labels)]
        value = loss_of(logits, [labels], None, width=6)
        assert value.item() == pytest.approx(-math.log(probability) / len(labels))


def test_all_steps_of_padded_logits_count():
    logits = sample()
    torch.testing.assert_close(loss_of(logits, LABELS, None), torchs(logits, LABELS, [T] * B))
    torch.testing.assert_close(loss_of(logits, LABELS, None), loss_of(logits, LABELS, [T] * B))


def test_a_sequence_too_short_for_its_labels_contributes_nothing():
    labels = [[1, 1], [1, 1, 1, 1], [2, 3], [], [1]]  # the second needs 7 steps, the third 2 of its one
    logits = sample().requires_grad_()
    value = loss_of(logits, labels)
    torch.testing.assert_close(value, torchs(logits, labels))
    value.backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[1:3].any()
    assert logits.grad[0].any()


@pytest.mark.parametrize("width", [0, 1, 3])
@pytest.mark.parametrize("lengths", [LENGTHS, None], ids=["packed", "padded"])
def test_a_batch_without_labels_gives_zero_and_a_gradient_of_zero(lengths, width):
    logits = sample().requires_grad_()
    value = loss_of(logits, [[]] * B, lengths, width=width)
    assert value.item() == 0
    value.backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_another_class_may_fill_up_the_labels():
    logits = sample()
    for ignored in (-1, 0, 77):
        value = loss_of(logits, LABELS, loss=CTCLoss(ignore_index=ignored), value=ignored)
        torch.testing.assert_close(value, torchs(logits, LABELS))


WRONG = {
    "blank": (torch.tensor([[1, 0]] * B), IndexError, "Target 0 is out of bounds: expected 1 to 4"),
    "too large": (torch.tensor([[1, 5]] * B), IndexError, "Target 5 is out of bounds: expected 1 to 4"),
    "negative": (torch.tensor([[-1, 1]] * B), IndexError, "Target -1 is out of bounds"),
    "a hole": (torch.tensor([[1, -100, 2]] * B), ValueError, "expected labels first and -100 behind them"),
    "filled in front": (torch.tensor([[-100, 2]] * B), ValueError, "expected labels first and -100 behind them"),
    "fewer": (torch.tensor([[1, 2]] * (B - 1)), ValueError, "expected labels of 5 sequences, got 4"),
    "float": (torch.ones(B, 2), TypeError, "expected int64 labels"),
    "one dimension": (torch.ones(B, dtype=torch.int64), TypeError, "expected int64 labels"),
    "packed": (pack(torch.ones(B, T).long(), LENGTHS, batch_first=True), TypeError, "expected int64 labels"),
}


@pytest.mark.parametrize("packed", [True, False], ids=["packed logits", "padded logits"])
@pytest.mark.parametrize(("targets", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_labels_are_refused_by_the_name_of_the_task(targets, error, message, packed):
    logits = pack(sample(), LENGTHS, batch_first=True) if packed else sample()
    with pytest.raises(error, match=rf"targets\['c'\]: {message}"):
        JointLoss({"c": 1.0}, {"c": CTCLoss()})({"c": logits}, {"c": targets})


def test_logits_of_another_rank_are_refused():
    with pytest.raises(ValueError, match="expected logits"):
        JointLoss({"c": 1.0}, {"c": CTCLoss()})({"c": torch.randn(B, C)}, {"c": filled(LABELS)})


def test_half_precision_logits_are_widened_as_by_the_other_losses():
    logits = sample(torch.bfloat16)
    value = loss_of(logits.requires_grad_(), LABELS)
    torch.testing.assert_close(value, loss_of(logits.detach().float(), LABELS))
    value.backward()


# In a model.


def model_and_targets():
    heads = {"c": CTCHead(C), "a": ClassificationHead(3), "slots": TokenClassificationHead(4)}
    model = MultiTaskModel(nn.Embedding(12, 4), LSTM(4, 6, batch_first=True, bidirectional=True), heads).double()
    targets = {"c": filled(LABELS), "a": torch.tensor([0, 2, 1, -100, 1])}
    return model, torch.randint(12, (B, T)), targets


def test_it_trains_beside_other_heads_on_packed_tokens():
    model, tokens, targets = model_and_targets()
    packed = pack(tokens, LENGTHS, batch_first=True)
    result = JointLoss({"c": 0.3, "a": 2.0, "slots": 1.0}, model.losses)(model(packed), targets)
    padded = model(tokens, LENGTHS)
    expected = {"c": torchs(padded["c"], LABELS), "a": F.cross_entropy(padded["a"], targets["a"])}
    torch.testing.assert_close(result.per_task, expected, check_dtype=True)
    total = 0.3 * expected["c"] + 2.0 * expected["a"]
    torch.testing.assert_close(result.total, total)
    wanted = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    found = torch.autograd.grad(result.total, list(model.parameters()), allow_unused=True)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(*(torch.zeros(()).double() if g is None else g for g in (a, b)))


def test_it_learns_to_read_out_what_is_written():
    torch.manual_seed(0)
    model = MultiTaskModel(nn.Embedding(5, 8), LSTM(8, 16, batch_first=True, bidirectional=True), {"c": CTCHead(5)})
    labels = [[1, 2], [3, 3, 4], [2], [4, 1, 4]]
    tokens = pad_sequence([torch.tensor([c for x in row for c in (x, x, 0)]) for row in labels], True)
    packed = pack(tokens, [3 * len(row) for row in labels], batch_first=True)
    joint, optimizer = JointLoss({"c": 1.0}, model.losses), torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        joint(model(packed), {"c": filled(labels)}).total.backward()
        optimizer.step()
    logits = model(packed)["c"]
    assert ctc_greedy(logits) == labels
    assert [found for found, _ in ctc_beam(logits)] == labels


# Decoding.


def plain_greedy(logits, lengths):
    return [list(merged(z[:n].argmax(-1).tolist())) for z, n in zip(logits, lengths)]


def test_greedy_decoding_merges_the_best_path():
    scored = torch.full((1, 7, 3), -1.0)
    for step, c in enumerate([1, 1, 0, 1, 2, 2, 0]):
        scored[0, step, c] = 1.0
    assert ctc_greedy(scored) == [[1, 1, 2]]
    assert ctc_greedy(scored, [3]) == [[1]]
    assert ctc_greedy(scored[:, 2:3]) == [[]]


def test_greedy_decoding_takes_every_layout():
    logits = 3 * torch.randn(40, T, 3)
    lengths = torch.randint(1, T + 1, (40,))
    expected = plain_greedy(logits, lengths.tolist())
    assert ctc_greedy(logits, lengths) == expected
    assert ctc_greedy(logits, lengths.tolist()) == expected
    assert ctc_greedy(pack(logits, lengths, batch_first=True)) == expected
    assert ctc_greedy(logits) == plain_greedy(logits, [T] * 40)


@pytest.mark.parametrize(("steps", "classes"), [(1, 2), (1, 4), (2, 3), (4, 2), (5, 3), (4, 4)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_a_large_beam_finds_the_likeliest_of_all_labels(steps, classes, scale):
    logits = scale * torch.randn(4, steps, classes, dtype=torch.float64)
    for row, (labels, score) in zip(logits, ctc_beam(logits, beam_size=10_000)):
        probabilities = by_enumeration(row)
        best = max(probabilities, key=probabilities.get)
        assert sum(probabilities.values()) == pytest.approx(1)
        assert tuple(labels) == best
        assert score == pytest.approx(math.log(probabilities[best]))


def test_the_beam_beats_the_best_path_where_many_paths_agree():
    # Each step: blank 0.4, label 1 0.35, label 2 0.25. The best path is all blank, 0.16; label 1 has 0.4025.
    logits = torch.tensor([[0.4, 0.35, 0.25]] * 2, dtype=torch.float64).log().unsqueeze(0)
    assert ctc_greedy(logits) == [[]]
    ((labels, score),) = ctc_beam(logits)
    assert labels == [1]
    assert math.exp(score) == pytest.approx(0.4 * 0.35 * 2 + 0.35**2)


@pytest.mark.parametrize("beam_size", [1, 2, 5])
def test_a_small_beam_never_claims_more_than_the_labels_have(beam_size):
    logits = torch.randn(10, 5, 3, dtype=torch.float64)
    for row, (labels, score) in zip(logits, ctc_beam(logits, beam_size=beam_size)):
        assert score <= math.log(by_enumeration(row)[tuple(labels)]) + 1e-9


def test_beam_search_takes_every_layout_and_lengths():
    logits = torch.randn(B, T, 3)
    alone = [ctc_beam(z[:n].unsqueeze(0))[0] for z, n in zip(logits, LENGTHS)]
    for given in (ctc_beam(logits, LENGTHS), ctc_beam(pack(logits.requires_grad_(), LENGTHS, batch_first=True))):
        assert [labels for labels, _ in given] == [labels for labels, _ in alone]
        assert [score for _, score in given] == pytest.approx([score for _, score in alone])


def test_impossible_labels_are_not_found():
    logits = torch.randn(1, 4, 4)
    logits[..., 2] = -torch.inf
    ((labels, score),) = ctc_beam(logits, beam_size=1000)
    assert 2 not in labels
    assert math.isfinite(score)


@pytest.mark.parametrize("beam_size", [0, -1])
def test_a_beam_of_nothing_is_refused(beam_size):
    with pytest.raises(ValueError, match="beam_size: expected a number above 0"):
        ctc_beam(torch.randn(1, 2, 3), beam_size=beam_size)
