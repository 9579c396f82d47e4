"""The CRF module, its head and its loss."""

import copy
import itertools
import pickle

import pytest
import torch
from parity import assert_same_bits
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pymtl import CRF, LSTM, ClassificationHead, CRFHead, CRFLoss, JointLoss, MultiTaskModel, ops, pack, reference
from pymtl.training.reference_model import MultiTaskModel as ReferenceModel

LABELS = ["B-x", "B-y", "I-x", "I-y", "O"]
LENGTHS = [4, 7, 1, 5]
B, T, C = len(LENGTHS), 7, len(LABELS)


def case(batch_first=True, labels=None, dtype=torch.float32, seed=0):
    """A CRF of random transitions, and padded emissions and tags."""
    torch.manual_seed(seed)
    crf = CRF(C, labels, batch_first).to(dtype)
    for parameter in crf.parameters():
        nn.init.normal_(parameter)
    shape = (B, T) if batch_first else (T, B)
    emissions = torch.randn(*shape, C, dtype=dtype)
    tags = torch.randint(0, C, shape)
    if labels is not None:
        tags = tags.masked_fill((tags == 2) | (tags == 3), 4)  # no inside without its beginning
    return crf, emissions, tags


def by_sentence(crf, emissions, tags):
    """The log-likelihood of each sentence by itself, in plain PyTorch."""
    results = []
    for row, length in enumerate(LENGTHS):
        e, y = (z[row] if crf.batch_first else z[:, row] for z in (emissions, tags))
        ones = torch.ones(length, dtype=torch.int64)
        results.append(reference.crf(e[:length], ones, y[:length], *crf.scores()))
    return torch.cat(results)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("labels", [None, LABELS], ids=["free", "BIO"])
def test_log_likelihoods_are_those_of_each_sentence_alone(batch_first, labels):
    crf, emissions, tags = case(batch_first, labels, torch.float64)
    expected = by_sentence(crf, emissions, tags)
    torch.testing.assert_close(crf.log_likelihood(emissions, tags, LENGTHS), expected)
    packed = [pack_padded_sequence(z, LENGTHS, batch_first, enforce_sorted=False) for z in (emissions, tags)]
    torch.testing.assert_close(crf.log_likelihood(*packed), expected)
    torch.testing.assert_close(crf(emissions, tags, LENGTHS), -expected.sum() / sum(LENGTHS))
    torch.testing.assert_close(crf(*packed), -expected.sum() / sum(LENGTHS))


def test_without_lengths_all_sentences_are_whole():
    crf, emissions, tags = case()
    assert_same_bits(
        {"loss": crf(emissions, tags), "each": crf.log_likelihood(emissions, tags)},
        {"loss": crf(emissions, tags, [T] * B), "each": crf.log_likelihood(emissions, tags, [T] * B)},
    )


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("labels", [None, LABELS], ids=["free", "BIO"])
def test_decoding_finds_each_sentence_s_best_path(batch_first, labels):
    crf, emissions, _ = case(batch_first, labels, torch.float64)
    tags, scores = crf.decode(emissions, LENGTHS)
    packed, again = crf.decode(pack_padded_sequence(emissions, LENGTHS, batch_first, enforce_sorted=False))
    assert torch.equal(pad_packed_sequence(packed, batch_first)[0], tags)
    assert torch.equal(again, scores)
    start, end, transitions = (score.detach() for score in crf.scores())
    for row, length in enumerate(LENGTHS[:1] + LENGTHS[2:]):  # 5 ** 7 paths would take long
        row += row > 0
        e = (emissions[row] if batch_first else emissions[:, row])[:length]
        path = (tags[row] if batch_first else tags[:, row])[:length].tolist()
        best = max(
            itertools.product(range(C), repeat=length),
            key=lambda y: float(
                start[y[0]]
                + end[y[-1]]
                + sum(e[t, y[t]] for t in range(length))
                + sum(transitions[a, b] for a, b in itertools.pairwise(y))
            ),
        )
        assert path == list(best)
        if labels is not None:
            for before, after in itertools.pairwise(["O", *(labels[y] for y in path)]):
                assert not after.startswith("I-") or before[1:] == after[1:]


def test_labels_forbid_what_bio_forbids():
    start, _, transitions = CRF(C, LABELS).scores()
    assert [label for label, score in zip(LABELS, start) if score == -torch.inf] == ["I-x", "I-y"]
    allowed = {(a, b) for a, row in zip(LABELS, transitions) for b, score in zip(LABELS, row) if score > -torch.inf}
    insides = {(a, b) for a, b in allowed if b.startswith("I-")}
    assert insides == {("B-x", "I-x"), ("I-x", "I-x"), ("B-y", "I-y"), ("I-y", "I-y")}
    assert len(allowed) == C * 3 + 4


def test_tags_that_the_labels_forbid_are_impossible_and_their_scores_have_no_gradient():
    crf, emissions, tags = case(labels=LABELS)
    crf(emissions, tags, LENGTHS).backward()
    _, _, transitions = crf.scores()
    assert not crf.transitions.grad[transitions == -torch.inf].any()
    tags[0, 0] = 2
    assert crf.log_likelihood(emissions, tags, LENGTHS)[0] == -torch.inf


def test_it_learns_which_tags_follow_each_other():
    torch.manual_seed(0)
    crf = CRF(3, batch_first=True)
    tags = torch.tensor([[0, 1, 2, 0, 1, 2], [1, 2, 0, 1, 2, 0], [2, 0, 1, 2, 0, 1]])
    emissions = torch.zeros(3, 6, 3)
    emissions[torch.arange(3), 0, tags[:, 0]] = 5.0  # nothing but the first tag is told
    optimizer = torch.optim.Adam(crf.parameters(), lr=0.1)
    first = crf(emissions, tags).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = crf(emissions, tags)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * first
    assert torch.equal(crf.decode(emissions)[0], tags)


def test_half_precision_runs_in_plain_pytorch():
    crf, emissions, tags = case(dtype=torch.bfloat16)
    exact = by_sentence(copy.deepcopy(crf).double(), emissions.double(), tags)
    torch.testing.assert_close(crf.log_likelihood(emissions, tags, LENGTHS).double(), exact, rtol=0.05, atol=0.5)


def test_it_is_copied_pickled_and_saved():
    crf, emissions, tags = case(labels=LABELS)
    expected = crf(emissions, tags, LENGTHS)
    assert set(crf.state_dict()) == {"start_transitions", "end_transitions", "transitions"}
    other = CRF(C, LABELS, batch_first=True)
    other.load_state_dict(crf.state_dict())
    for same in (copy.deepcopy(crf), pickle.loads(pickle.dumps(crf)), other):
        assert torch.equal(same(emissions, tags, LENGTHS), expected)
    assert repr(crf) == "CRF(5, batch_first=True, BIO)"


# The loss


@pytest.mark.parametrize("packed", [False, True])
def test_the_joint_loss_takes_it_beside_others(packed):
    crf, emissions, tags = case()
    padding = torch.arange(T) >= torch.tensor(LENGTHS).unsqueeze(1)
    tags = tags.masked_fill(padding, -100)
    logits, classes = torch.randn(B, 3), torch.tensor([0, 2, -100, 1])
    slots = [emissions, tags]
    if packed:
        slots = [pack_padded_sequence(z, LENGTHS, True, enforce_sorted=False) for z in slots]
    joint = JointLoss({"slots": 0.7, "intent": 0.3}, {"slots": CRFLoss(crf)})
    result = joint({"slots": slots[0], "intent": logits}, {"slots": slots[1], "intent": classes})
    expected = {
        "slots": crf(emissions, tags.masked_fill(padding, 0), LENGTHS),
        "intent": nn.functional.cross_entropy(logits, classes),
    }
    assert list(result.per_task) == ["slots", "intent"]
    for task, value in expected.items():
        torch.testing.assert_close(result.per_task[task], value)
    torch.testing.assert_close(result.total, 0.7 * expected["slots"] + 0.3 * expected["intent"])


@pytest.mark.parametrize("packed", [False, True])
def test_a_sentence_without_tags_contributes_nothing(packed):
    crf, emissions, tags = case()
    tags = tags.masked_fill(torch.arange(T) >= torch.tensor(LENGTHS).unsqueeze(1), -100)
    tags[1] = -100

    def loss(emissions, tags, lengths):
        if packed:
            emissions, tags = (pack_padded_sequence(z, lengths, True, enforce_sorted=False) for z in (emissions, tags))
        return CRFLoss(crf)(emissions, tags)

    emissions.requires_grad_()
    value = loss(emissions, tags, LENGTHS)
    rest = [0, 2, 3]
    torch.testing.assert_close(value, loss(emissions[rest], tags[rest], [LENGTHS[i] for i in rest]))
    value.backward()
    assert not emissions.grad[1].any()
    assert emissions.grad[0].any()


def by_layout(packed, *tensors):
    if not packed:
        return tensors
    return tuple(pack_padded_sequence(tensor, LENGTHS, True, enforce_sorted=False) for tensor in tensors)


every_layout = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])


@every_layout
def test_a_batch_without_tags_gives_zero_and_a_gradient_of_zero(packed):
    crf, emissions, tags = case()
    emissions.requires_grad_()
    logits, targets = by_layout(packed, emissions, torch.full_like(tags, -100))
    total = JointLoss({"slots": 1.0}, {"slots": CRFLoss(crf)})({"slots": logits}, {"slots": targets}).total
    assert total.item() == 0.0
    total.backward()
    assert not emissions.grad.any()


@every_layout
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_sentence_without_tags_contributes_nothing_whatever_it_holds(packed, value):
    crf, emissions, tags = case()
    tags = tags.masked_fill(torch.arange(T) >= torch.tensor(LENGTHS).unsqueeze(1), -100)
    tags[1] = -100
    found = []
    for edit in (emissions, emissions.index_fill(0, torch.tensor([1]), value)):
        crf.zero_grad()
        logits, targets = by_layout(packed, edit, tags)
        loss = CRFLoss(crf)(logits, targets)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in crf.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found))
    assert all(torch.isfinite(values).all() for values in found[1])


def test_packed_tags_may_lack_the_order_the_emissions_have():
    crf, emissions, _ = case()
    tags = torch.randint(0, C, (B, T)).masked_fill(torch.arange(T) >= torch.tensor(LENGTHS).unsqueeze(1), -100)
    tags[0] = -100
    logits, targets = by_layout(True, emissions, tags)
    expected = CRFLoss(crf)(logits, targets)
    assert torch.equal(CRFLoss(crf)(logits, targets._replace(sorted_indices=None, unsorted_indices=None)), expected)


def test_a_sentence_with_some_of_its_tags_counts_all_paths_through_them():
    crf, emissions, tags = case(labels=LABELS, dtype=torch.float64)
    tags = tags.masked_fill(torch.arange(T) >= torch.tensor(LENGTHS).unsqueeze(1), -100)
    tags[3, 1], tags[0, 0], tags[1] = -100, -100, -100
    emissions.requires_grad_()
    logits, targets = by_layout(True, emissions, tags)
    loss = CRFLoss(crf)(logits, targets)
    grads = torch.autograd.grad(loss, [emissions, *crf.parameters()])

    start, end, transitions = crf.scores()
    through, whole = [], []
    for row, length in enumerate(LENGTHS):
        if not (tags[row] != -100).any():
            continue
        scores = {}
        for path in itertools.product(range(C), repeat=length):
            score = start[path[0]] + end[path[-1]] + sum(emissions[row, t, y] for t, y in enumerate(path))
            scores[path] = score + sum(transitions[a, b] for a, b in itertools.pairwise(path))
        known = [(t, int(y)) for t, y in enumerate(tags[row, :length]) if y != -100]
        allowed = [score for path, score in scores.items() if all(path[t] == y for t, y in known)]
        through.append(torch.logsumexp(torch.stack(allowed), 0))
        whole.append(torch.logsumexp(torch.stack(list(scores.values())), 0))
    expected = (sum(whole) - sum(through)) / (tags != -100).sum()
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, [emissions, *crf.parameters()]), strict=True):
        torch.testing.assert_close(ours, theirs.nan_to_num())


def test_a_padded_sentence_with_some_of_its_tags_is_refused_with_the_way_out():
    crf, emissions, tags = case()
    tags = tags.masked_fill(torch.arange(T) >= torch.tensor(LENGTHS).unsqueeze(1), -100)
    tags[3, 1] = -100
    joint = JointLoss({"slots": 1.0}, {"slots": CRFLoss(crf)})
    with pytest.raises(ValueError, match=r"targets\['slots'\]: .* for sentence 3: .* Pack logits and tags"):
        joint({"slots": emissions}, {"slots": tags})
    packed = [pack(each, LENGTHS, batch_first=True) for each in (emissions, tags)]
    assert joint({"slots": packed[0]}, {"slots": packed[1]}).total.isfinite()


def test_bad_tags_and_layouts_are_refused_by_task():
    crf, emissions, tags = case()
    joint = JointLoss({"slots": 1.0}, {"slots": CRFLoss(crf)})
    with pytest.raises(IndexError, match=r"targets\['slots'\]: expected tags from 0 to 4, got 5"):
        joint({"slots": emissions}, {"slots": tags.masked_fill(tags == 1, 5)})
    with pytest.raises(TypeError, match=r"targets\['slots'\]: expected int64 tags, got torch.int32"):
        joint({"slots": emissions}, {"slots": tags.int()})
    with pytest.raises(ValueError, match=r"targets\['slots'\]: expected tags \[4, 7\]"):
        joint({"slots": emissions}, {"slots": tags[:, :6]})
    with pytest.raises(ValueError, match=r"targets\['slots'\]: expected tags \[7\] for logits \[B, T, C\]"):
        joint({"slots": emissions[0]}, {"slots": tags})
    packed = pack_padded_sequence(emissions, LENGTHS, True, enforce_sorted=False)
    with pytest.raises(TypeError, match=r"targets\['slots'\]: expected a PackedSequence like the logits, got a Tensor"):
        joint({"slots": packed}, {"slots": tags})
    other = pack_padded_sequence(tags, [7, 7, 2, 1], True, enforce_sorted=False)
    with pytest.raises(ValueError, match=r"targets\['slots'\]: expected the packing of the logits"):
        joint({"slots": packed}, {"slots": other})


def test_only_bio_s_own_prefixes_open_a_span():
    labels = ["O", "B-x", "I-x", "S-x", "E-x", "I-y", "B", "I"]
    crf = CRF(len(labels), labels)
    _, _, transitions = crf.scores()
    allowed = {(labels[i], labels[j]) for i, j in (transitions > -torch.inf).nonzero().tolist()}
    into = {"I-x": {"B-x", "I-x"}, "I-y": {"I-y"}, "I": {"B", "I"}}
    for name, before in into.items():
        assert {a for a, b in allowed if b == name} == before


def test_labels_bind_a_model_made_without_memory():
    with torch.device("meta"):
        made = CRF(C, LABELS)
    made = made.to_empty(device="cpu")
    other = CRF(C, LABELS)
    made.load_state_dict(other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(made.scores(), other.scores()))


def test_an_empty_batch_has_no_loss():
    crf = CRF(C, batch_first=True)
    assert crf(torch.zeros(0, 3, C), torch.zeros(0, 3, dtype=torch.int64), []).item() == 0.0


# In a model


def models(dtype=torch.float64):
    made = []
    for kind, lstm in ((MultiTaskModel, LSTM), (ReferenceModel, nn.LSTM)):
        heads = {"slots": CRFHead(C, LABELS), "intent": ClassificationHead(3)}
        encoder = lstm(6, 8, batch_first=True, bidirectional=True, dtype=dtype)
        made.append(kind(nn.Embedding(20, 6, dtype=dtype), encoder, heads).to(dtype))
    made[1].load_state_dict(made[0].state_dict())
    return made


def test_a_model_trains_its_head_as_plain_pytorch_would():
    torch.manual_seed(0)
    ours, theirs = models()
    tokens = torch.randint(1, 20, (B, T))
    _, _, tags = case(labels=LABELS)
    tags = tags.masked_fill(torch.arange(T) >= torch.tensor(LENGTHS).unsqueeze(1), -100)
    logits = ours(tokens, torch.tensor(LENGTHS))
    JointLoss({"slots": 1.0}, {"slots": ours.losses["slots"]})(
        {"slots": logits["slots"]}, {"slots": tags}
    ).total.backward()
    emissions = theirs(tokens, torch.tensor(LENGTHS))["slots"]
    (-by_sentence(theirs.heads["slots"].crf, emissions, tags).sum() / sum(LENGTHS)).backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=name)
    found = [m.heads["slots"].crf.decode(m(tokens, torch.tensor(LENGTHS))["slots"], LENGTHS)[0] for m in (ours, theirs)]
    assert torch.equal(*found)


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_head_is_laid_out_as_the_encoder(batch_first):
    head = CRFHead(C)
    model = MultiTaskModel(None, LSTM(6, 8, batch_first=batch_first, dtype=torch.float64), {"slots": head})
    assert head.crf.batch_first == batch_first
    assert head.crf.transitions.dtype == torch.float64
    assert model.losses["slots"].crf is head.crf


# Bad input


@pytest.mark.parametrize("count", [0, -1, 2.5, "x"])
def test_a_number_of_tags_that_is_none(count):
    with pytest.raises(ValueError, match="num_tags: expected a number above 0"):
        CRF(count)


def test_labels_of_another_number():
    with pytest.raises(ValueError, match="labels: expected 3 names, got 2"):
        CRF(3, ["O", "B-x"])


def test_layouts_that_do_not_fit():
    crf, emissions, tags = case()
    packed = pack_padded_sequence(emissions, LENGTHS, True, enforce_sorted=False)
    with pytest.raises(ValueError, match="emissions: expected a 3-D padded batch, got 2-D"):
        crf(emissions[0], tags[0])
    with pytest.raises(ValueError, match="lengths: expected none with a PackedSequence"):
        crf(packed, packed, LENGTHS)
    with pytest.raises(TypeError, match="tags: expected a PackedSequence like the emissions, got a Tensor"):
        crf(packed, tags)
    with pytest.raises(ValueError, match=r"tags: expected shape \[4, 7\], got \[4, 6\]"):
        crf(emissions, tags[:, :6])
    with pytest.raises(RuntimeError, match="lengths: expected lengths from 1 to 7"):
        crf(emissions, tags, [8, 1, 1, 1])
    with pytest.raises(RuntimeError, match=r"emissions: expected 5 scores a token, got \[28, 4\]"):
        crf(emissions[..., :4], tags)
    with pytest.raises(IndexError, match="tags: expected classes from 0 to 4, got"):
        crf(emissions, tags + 9)


def test_the_op_and_the_module_give_the_same_bits():
    crf, emissions, tags = case()
    order = ops.packing_order(torch.tensor(LENGTHS), T)
    flat = ops.crf(
        ops.pack(emissions, order, batch_first=True),
        order.batch_sizes,
        ops.pack(tags, order, batch_first=True),
        *crf.scores(),
    )
    assert_same_bits(
        {"each": crf.log_likelihood(emissions, tags, LENGTHS)}, {"each": flat.index_select(0, order.unsorted_indices)}
    )
