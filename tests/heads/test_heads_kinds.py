"""Ordered classes, and heads that read more than the states: the tokens themselves, and other tasks' labels."""

import copy
import itertools
import math

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
    CRFHead,
    CTCHead,
    JointLoss,
    LanguageModelHead,
    MultiLabelHead,
    MultiTaskModel,
    OrdinalHead,
    OrdinalLoss,
    Reads,
    RegressionHead,
    TokenClassificationHead,
    pack,
)

VOCABULARY, E, H = 20, 5, 6
LENGTHS = [3, 6, 1, 4]
B, T = len(LENGTHS), 6
VALID = torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(1)
NONE = -100


def model_of(heads, bidirectional=True, layers=1):
    encoder = LSTM(E, H, layers, batch_first=True, bidirectional=bidirectional)
    return MultiTaskModel(nn.Embedding(VOCABULARY, E), encoder, heads).double()


def tokens_of():
    """The padding holds ids too, to be sure that nobody reads it."""
    return torch.randint(VOCABULARY, (B, T))


def gradients(total, model):
    named = dict(model.named_parameters())
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found)}


# The loss of ordered classes.


def coral(logits, classes, ignore_index=NONE):
    """Equation 4, number by number: the loss and its gradient in the logits."""
    terms, gradient = [], torch.zeros_like(logits)
    for index in itertools.product(*(range(n) for n in classes.shape)):
        y = int(classes[index])
        if y == ignore_index:
            continue
        for k in range(logits.shape[-1]):
            above = 1 / (1 + math.exp(-float(logits[(*index, k)])))
            terms.append(-math.log(above) if y > k else -math.log(1 - above))
            gradient[(*index, k)] = above - (y > k)
    count = max(len(terms), 1)
    return sum(terms) / count, gradient / count


def loss_and_gradient(logits, classes, loss):
    leaf = logits.clone().requires_grad_()
    total = JointLoss({"o": 1.0}, {"o": loss})({"o": leaf}, {"o": classes}).total
    total.backward()
    return total.item(), leaf.grad


@pytest.mark.parametrize("thresholds", [1, 2, 5])
@pytest.mark.parametrize("shape", [(7,), (2, 5)], ids=["sequences", "tokens"])
def test_the_ordinal_loss_is_corals(shape, thresholds):
    logits = torch.randn(*shape, thresholds, dtype=torch.float64)
    classes = torch.arange(math.prod(shape)).view(shape) % (thresholds + 1)
    classes.flatten()[2] = NONE
    for dtype in (torch.int64, torch.int32):
        value, gradient = loss_and_gradient(logits, classes.to(dtype), OrdinalLoss())
        expected, of_logits = coral(logits, classes)
        assert value == pytest.approx(expected)
        torch.testing.assert_close(gradient, of_logits)
        assert not gradient.view(-1, thresholds)[2].any()


@pytest.mark.parametrize("ignored", [0, 1, 2, 9, -1])
def test_any_class_can_be_the_one_that_means_no_label(ignored):
    logits = torch.randn(5, 3, dtype=torch.float64)
    classes = torch.tensor([0, 3, 1, 2, ignored])
    value, gradient = loss_and_gradient(logits, classes, OrdinalLoss(ignore_index=ignored))
    expected, of_logits = coral(logits, classes, ignored)
    assert value == pytest.approx(expected)
    torch.testing.assert_close(gradient, of_logits)


def test_ordered_classes_of_packed_tokens_are_taken():
    logits = torch.randn(B, T, 3, dtype=torch.float64)
    classes = torch.randint(4, (B, T)).masked_fill(~VALID, NONE)
    packed = [pack(z, LENGTHS, batch_first=True) for z in (logits, classes)]
    total = JointLoss({"o": 1.0}, {"o": OrdinalLoss()})({"o": packed[0]}, {"o": packed[1]}).total
    assert total.item() == pytest.approx(coral(logits, classes)[0])


def test_no_label_at_all_gives_zero_and_no_gradient():
    value, gradient = loss_and_gradient(torch.randn(4, 3), torch.full((4,), NONE), OrdinalLoss())
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        (torch.tensor([0, 4, 1]), IndexError, r"targets\['o'\]: Target 4 is out of bounds"),
        (torch.tensor([0, -1, 1]), IndexError, r"targets\['o'\]: Target -1 is out of bounds"),
        (torch.tensor([0.0, 1.0, 1.0]), RuntimeError, r"targets\['o'\]: expected int64 classes, got torch.float32"),
        (torch.tensor([0, 1]), ValueError, r"targets\['o'\]: expected shape"),
        (torch.zeros(3, 3, dtype=torch.int64), ValueError, r"targets\['o'\]: expected shape"),
    ],
    ids=["too large", "negative", "float", "fewer", "levels"],
)
def test_targets_that_are_no_classes_are_refused(classes, error, message):
    with pytest.raises(error, match=message):
        JointLoss({"o": 1.0}, {"o": OrdinalLoss()})({"o": torch.randn(3, 3)}, {"o": classes})


def test_extreme_logits_give_a_finite_loss():
    value, gradient = loss_and_gradient(torch.tensor([[500.0, -500.0]]), torch.tensor([0]), OrdinalLoss())
    assert value == pytest.approx(250)
    torch.testing.assert_close(gradient, torch.tensor([[0.5, 0.0]]))


# Its head.


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_an_ordinal_head_starts_with_all_classes_equally_likely(classes):
    head = OrdinalHead(classes, in_features=4)
    assert head.weight.shape == (1, 4)
    above = [math.exp(b) / (1 + math.exp(b)) for b in head.bias.tolist()]
    assert above == pytest.approx([1 - (k + 1) / classes for k in range(classes - 1)], rel=1e-5)
    with torch.no_grad():
        head.bias.zero_()
        head.weight.zero_()
    head.reset_parameters()
    assert head.weight.any()
    assert torch.sigmoid(head.bias).tolist() == pytest.approx(above)


def test_the_class_is_the_number_of_thresholds_passed():
    logits = torch.tensor([[3.0, 1.0, -1.0], [-1.0, -2.0, -3.0], [1.0, 1.0, 1.0], [0.5, 0.0, -1.0]])
    assert OrdinalHead.classes(logits).tolist() == [2, 0, 3, 1]
    assert OrdinalHead.classes(logits.view(2, 2, 3)).tolist() == [[2, 0], [3, 1]]
    assert OrdinalHead.classes(logits[0]).item() == 2
    assert OrdinalHead.classes(logits).dtype == torch.int64


@pytest.mark.parametrize("classes", [1, 0, -2, 2.0, "3", None], ids=str)
def test_fewer_than_two_ordered_classes_are_refused(classes):
    with pytest.raises(ValueError, match=r"num_classes: expected a number above 1"):
        OrdinalHead(classes)


def test_the_shared_weight_gets_the_sum_of_the_thresholds_gradients():
    head = OrdinalHead(5, in_features=4).double()
    x, seed = torch.randn(7, 4, dtype=torch.float64, requires_grad=True), torch.randn(7, 4, dtype=torch.float64)
    scores = x @ head.weight[0]
    expected = torch.stack([scores + b for b in head.bias], 1)
    actual = head(x)
    torch.testing.assert_close(actual, expected)
    leaves = [x, head.weight, head.bias]
    torch.testing.assert_close(
        torch.autograd.grad(actual, leaves, seed), torch.autograd.grad(expected, leaves, seed, retain_graph=True)
    )
    (of_weight,) = torch.autograd.grad(expected, head.weight, seed)
    torch.testing.assert_close(of_weight, (seed.sum(1) @ x).unsqueeze(0))
    assert torch.autograd.gradcheck(lambda x, w, b: functional_call(head, {"weight": w, "bias": b}, x), leaves)


BESIDE = {
    "alone": {},
    "beside one of its kind": {"other": lambda: OrdinalHead(3, "last")},
    "beside others": {
        "a": lambda: ClassificationHead(3, "last"),
        "score": lambda: RegressionHead(2, "last"),
        "tags": lambda: MultiLabelHead(2, "last"),
        "slots": lambda: TokenClassificationHead(4),
        "mean": lambda: OrdinalHead(6, "mean"),
    },
}


@pytest.mark.parametrize("gradient", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("others", BESIDE.values(), ids=BESIDE)
@pytest.mark.parametrize("pooling", ["last", "mean", "max", "attention"])
def test_an_ordinal_head_in_a_model_gives_the_numbers_of_plain_pytorch(pooling, others, gradient):
    model = model_of({t: make() for t, make in others.items()} | {"o": OrdinalHead(5, pooling)})
    tokens = tokens_of()
    with torch.set_grad_enabled(gradient):
        logits, expected = model(tokens, LENGTHS), plain(model, tokens)
    for task, rows in expected.items():
        torch.testing.assert_close(ours(logits[task]), rows)
    if gradient:
        classes = torch.tensor([0, 4, NONE, 2])
        total = JointLoss({"o": 1.0}, {"o": OrdinalLoss()})({"o": logits["o"]}, {"o": classes}).total
        assert total.item() == pytest.approx(coral(logits["o"].detach(), classes)[0])
        z = torch.stack(expected["o"])[classes != NONE]
        y = (classes[classes != NONE].unsqueeze(1) > torch.arange(4)).double()
        plainly = F.binary_cross_entropy_with_logits(z, y)
        torch.testing.assert_close(gradients(total, model), gradients(plainly, model))


def test_an_ordinal_head_learns_an_order():
    torch.manual_seed(3)
    head = OrdinalHead(4, in_features=2)
    x = torch.randn(200, 2)
    classes = torch.bucketize(x @ torch.tensor([1.0, -2.0]), torch.tensor([-1.5, 0.0, 1.5]))
    joint = JointLoss({"o": 1.0}, {"o": head.loss})
    optimizer = torch.optim.Adam(head.parameters(), lr=0.2)
    for _ in range(150):
        optimizer.zero_grad()
        joint({"o": head(x)}, {"o": classes}).total.backward()
        optimizer.step()
    assert (OrdinalHead.classes(head(x)) == classes).double().mean() > 0.95
    assert head.bias.tolist() == sorted(head.bias.tolist(), reverse=True)


# What heads read: the oracle takes one sequence after another, alone, through torch's own LSTM.


def ours(values):
    """The rows of each sequence, without padding."""
    if isinstance(values, PackedSequence):
        values = pad_packed_sequence(values, True)[0]
    if values.dim() == 2:
        return list(values)
    return [row[:n] for row, n in zip(values, LENGTHS)]


def pooled(kind, states, last, head):
    if kind == "last":
        return last
    if kind == "mean":
        return states.mean(0)
    if kind == "max":
        return states.amax(0)
    scores = torch.tanh(states @ head.attention.weight.t()) @ head.attention.query[0]
    return scores.softmax(0) @ states


def plain(model, tokens, lengths=LENGTHS):
    """The logits of all tasks, rows of each sequence."""
    encoder = model.encoder
    lstm = nn.LSTM(E, H, encoder.num_layers, bidirectional=encoder.bidirectional, dtype=torch.float64)
    found = {task: [] for task in model.heads}
    for row, length in enumerate(lengths):
        x = model.embedding.weight[tokens[row, :length]]
        states, (h_n, _) = functional_call(lstm, dict(encoder.named_parameters()), x)
        last = h_n[-(2 if encoder.bidirectional else 1) :].flatten()
        logits = {}

        def read(task, x=x, states=states, last=last, logits=logits):
            if task in logits:
                return logits[task]
            head = model.heads[task]
            parts = [states if head.pooling is None else pooled(head.pooling, states, last, head)]
            if head.reads.skip:
                of_input = x.amax(0) if head.pooling == "max" else x.mean(0)
                parts.append(x if head.pooling is None else of_input)
            if head.reads.after is not None:
                before = read(head.reads.after)
                labels = torch.softmax(before, -1) @ head.label_embedding
                if head.pooling is None and before.dim() == 1:
                    labels = labels.expand(len(x), -1)
                elif head.pooling is not None and before.dim() == 2:
                    labels = labels.mean(0)
                parts.append(labels)
            weight, bias = head.projection()
            logits[task] = torch.cat(parts, -1) @ weight.t() + bias
            return logits[task]

        for task in model.heads:
            found[task].append(read(task))
    return found


def tokens_head(classes, **reads):
    return TokenClassificationHead(classes, reads=Reads(**reads))


def sequence_head(classes, pooling="last", **reads):
    return ClassificationHead(classes, pooling, reads=Reads(**reads))


READING = {
    "skip of tokens": lambda: {"a": tokens_head(3, skip=True), "b": TokenClassificationHead(2)},
    "skip of last": lambda: {"a": sequence_head(3, skip=True)},
    "skip of mean": lambda: {"a": sequence_head(3, "mean", skip=True)},
    "skip of max": lambda: {"a": sequence_head(3, "max", skip=True), "b": ClassificationHead(2, "max")},
    "skip of attention": lambda: {"a": sequence_head(3, "attention", skip=True)},
    "skip of several": lambda: {"a": sequence_head(3, "max", skip=True), "b": tokens_head(3, skip=True)},
    "token after token": lambda: {"a": tokens_head(3, after="b", label_embedding_dim=7), "b": tokens_head(4)},
    "token after sequence": lambda: {"a": tokens_head(3, after="b"), "b": sequence_head(4)},
    "sequence after token": lambda: {"a": sequence_head(3, after="b", label_embedding_dim=1), "b": tokens_head(4)},
    "sequence after sequence": lambda: {"a": sequence_head(3, after="b"), "b": sequence_head(4, "mean")},
    "maximum after token": lambda: {"a": sequence_head(3, "max", after="b"), "b": tokens_head(4)},
    "attention after sequence": lambda: {"a": sequence_head(3, "attention", after="b"), "b": sequence_head(4, "max")},
    "both": lambda: {"a": tokens_head(3, skip=True, after="b"), "b": sequence_head(4, "max", skip=True)},
    "a chain": lambda: {
        "a": tokens_head(3, skip=True, after="b"),
        "b": sequence_head(4, "mean", after="c"),
        "c": tokens_head(5, skip=True, after="d"),
        "d": sequence_head(2),
    },
    "two after one": lambda: {
        "b": tokens_head(4),
        "a": tokens_head(3, after="b"),
        "c": sequence_head(2, after="b", skip=True),
    },
    "tags after a class": lambda: {"a": CRFHead(3, reads=Reads(True, "b")), "b": sequence_head(4)},
    "numbers and order": lambda: {
        "a": RegressionHead(2, reads=Reads(True, "b")),
        "b": TokenClassificationHead(4),
        "c": OrdinalHead(4, "mean", reads=Reads(True, "b")),
        "d": MultiLabelHead(3, "max", reads=Reads(after="b")),
    },
}
every_reading = pytest.mark.parametrize("heads", READING.values(), ids=READING)


@pytest.mark.parametrize("mode", ["training", "evaluation", "inference"])
@every_reading
def test_logits_and_gradients_are_those_of_plain_pytorch(heads, mode):
    model, tokens = model_of(heads()), tokens_of()
    model.train(mode == "training")
    with torch.set_grad_enabled(mode != "inference"):
        logits, expected = model(tokens, LENGTHS), plain(model, tokens)
    assert list(logits) == list(model.heads)
    for task, rows in expected.items():
        torch.testing.assert_close(ours(logits[task]), rows)
    if mode != "inference":
        seeds = {task: [torch.randn_like(z) for z in rows] for task, rows in expected.items()}
        totals = [
            sum((z * s).sum() for task in seeds for z, s in zip(rows[task], seeds[task]))
            for rows in ({task: ours(z) for task, z in logits.items()}, expected)
        ]
        actual, wanted = (gradients(total, model) for total in totals)
        torch.testing.assert_close(actual, wanted)
        assert all(g.any() for name, g in wanted.items() if g.dim() > 1 and ".crf." not in name)


@pytest.mark.parametrize("encoder", [(False, 1), (True, 2)], ids=["one direction", "two layers"])
def test_other_encoders_are_read_alike(encoder):
    model, tokens = model_of(READING["a chain"](), *encoder), tokens_of()
    logits = model(tokens, LENGTHS)
    for task, rows in plain(model, tokens).items():
        torch.testing.assert_close(ours(logits[task]), rows)


@every_reading
def test_packed_and_padded_agree(heads):
    model, tokens = model_of(heads()), tokens_of()
    padded, packed = model(tokens, LENGTHS), model(pack(tokens, LENGTHS, batch_first=True))
    for task, z in padded.items():
        assert isinstance(packed[task], PackedSequence) == (model.heads[task].pooling is None)
        assert_same_bits(dict(enumerate(ours(packed[task]))), dict(enumerate(ours(z))))
        if z.dim() == 3:
            assert not z[~VALID].any()


@pytest.mark.parametrize("gradient", [True, False], ids=["training", "inference"])
@every_reading
def test_asking_for_one_task_computes_those_it_reads_after(heads, gradient):
    model, tokens = model_of(heads()), tokens_of()
    with torch.set_grad_enabled(gradient):
        whole = model(tokens, LENGTHS)
        for task in model.heads:
            alone = model(tokens, LENGTHS, tasks=[task])
            assert list(alone) == [task]
            torch.testing.assert_close(alone[task], whole[task])
        some = model(tokens, LENGTHS, tasks=list(model.heads)[::-1])
    assert list(some) == list(model.heads)[::-1]
    torch.testing.assert_close(dict(some), {task: whole[task] for task in some})


@every_reading
def test_sequences_of_one_token_have_as_many_tokens_as_sequences(heads):
    model, tokens = model_of(heads()), torch.randint(VOCABULARY, (B, 1))
    logits = model(tokens, [1] * B)
    for task, rows in plain(model, tokens, [1] * B).items():
        actual = logits[task] if logits[task].dim() == 2 else logits[task][:, :1]
        torch.testing.assert_close(actual, torch.stack(rows))


@pytest.mark.parametrize("gradient", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(
    "heads",
    [
        pytest.param(
            make,
            id=name,
        )
        for name, make in READING.items()
    ],
)
def test_an_empty_batch_gives_empty_logits(heads, gradient):
    model = model_of(heads())
    with torch.set_grad_enabled(gradient):
        logits = model(torch.zeros(0, T).long(), [])
    for task, head in model.heads.items():
        assert logits[task].shape == ((0, T) if head.pooling is None else (0,)) + (head.out_features,)


def test_each_reads_the_one_before_whatever_the_order_of_the_heads():
    kinds = {
        "a": lambda: tokens_head(3, after="b"),
        "b": lambda: sequence_head(4, after="c"),
        "c": lambda: TokenClassificationHead(5),
    }
    tokens, state, results = tokens_of(), None, []
    for order in itertools.permutations(kinds):
        model = model_of({task: kinds[task]() for task in order})
        state = state or copy.deepcopy(model.state_dict())
        model.load_state_dict(state)
        results.append(model(tokens, LENGTHS))
        assert list(results[-1]) == list(order)
        assert_same_bits({t: results[-1][t] for t in kinds}, {t: results[0][t] for t in kinds})


def test_the_labels_are_read_with_their_gradient():
    model = model_of({"a": tokens_head(3, after="b"), "b": TokenClassificationHead(4)})
    model(tokens_of(), LENGTHS, tasks=["a"])["a"].square().sum().backward()
    assert model.heads["b"].weight.grad.any()
    assert model.heads["a"].label_embedding.grad.any()


def test_the_sizes_of_what_is_read():
    model = model_of({"a": sequence_head(3, skip=True, after="b", label_embedding_dim=7), "b": sequence_head(4)})
    a = model.heads["a"]
    assert a.weight.shape == (3, 2 * H + E + 7)
    assert a.label_embedding.shape == (4, 7)
    assert a.label_embedding.dtype == torch.float64
    assert set(a.state_dict()) == {"weight", "bias", "label_embedding"}
    assert Reads() == Reads(False, None, 32)
    assert not hasattr(model.heads["b"], "label_embedding")


def test_joint_training_lowers_both_losses():
    torch.manual_seed(0)
    heads = {"a": tokens_head(3, after="b", skip=True), "b": sequence_head(4)}
    model = MultiTaskModel(nn.Embedding(VOCABULARY, E), LSTM(E, H, batch_first=True), heads, dropout=0.1)
    joint, tokens = JointLoss({"a": 1.0, "b": 1.0}, model.losses), tokens_of()
    targets = {"a": (tokens % 3).masked_fill(~VALID, NONE), "b": tokens[:, 0] % 4}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        result = joint(model(tokens, LENGTHS), targets)
        result.total.backward()
        optimizer.step()
        losses.append({task: value.item() for task, value in result.per_task.items()})
    assert all(losses[-1][task] < 0.3 * losses[0][task] for task in ("a", "b"))


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({"a": lambda: tokens_head(3, after="b")}, r"heads\['a'\]: reads after 'b', expected one of \['a'\]"),
        ({"a": lambda: tokens_head(3, after="a")}, r"heads: expected an order .*, got a circle of \['a'\]"),
        (
            {"a": lambda: tokens_head(3, after="b"), "b": lambda: tokens_head(3, after="a")},
            r"circle of \['a', 'b'\]",
        ),
        (
            {
                "d": lambda: tokens_head(3),
                "a": lambda: tokens_head(3, after="b"),
                "b": lambda: tokens_head(3, after="c"),
                "c": lambda: sequence_head(3, after="a"),
            },
            r"circle of \['a', 'b', 'c'\]",
        ),
    ],
    ids=["unknown", "itself", "two", "three"],
)
def test_circles_and_unknown_tasks_are_refused(heads, message):
    with pytest.raises(ValueError, match=message):
        model_of({task: make() for task, make in heads.items()})


@pytest.mark.parametrize("size", [0, -3])
def test_a_label_embedding_of_no_size_is_refused(size):
    with pytest.raises(ValueError, match="label_embedding_dim: expected a number above 0"):
        Reads(after="b", label_embedding_dim=size)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_model_with_reading_heads_repeats_with_its_seed(dropout):
    torch.manual_seed(2)
    encoder = LSTM(E, H, batch_first=True, bidirectional=True)
    model = MultiTaskModel(nn.Embedding(VOCABULARY, E), encoder, READING["a chain"](), dropout)
    tokens, found = tokens_of(), []
    for _ in range(2):
        torch.manual_seed(1)
        found.append(model(tokens, LENGTHS))
    assert_same_bits(*found)
    twin = copy.deepcopy(model).eval()
    assert_same_bits(twin(tokens, LENGTHS), model.eval()(tokens, LENGTHS))


@pytest.mark.parametrize("reads", [Reads(after="b"), Reads(skip=True)], ids=["after", "skip"])
def test_a_head_that_reads_more_takes_its_size_from_the_model_alone(reads):
    with pytest.raises(ValueError, match="in_features: expected none for a head that reads more"):
        ClassificationHead(3, in_features=2 * H, reads=reads)


def test_a_task_asked_for_twice_is_answered_once():
    model, tokens = model_of({"a": ClassificationHead(3)}), tokens_of()
    actual = model(tokens, LENGTHS, tasks=["a", "a"])
    assert list(actual) == ["a"]
    torch.testing.assert_close(actual["a"], model(tokens, LENGTHS)["a"])


@pytest.mark.parametrize("before", [lambda: LanguageModelHead(7), lambda: RegressionHead(2)], ids=["words", "numbers"])
def test_reading_after_a_task_of_no_classes_is_refused(before):
    with pytest.raises(ValueError, match="reads after 'b'"):
        model_of({"a": tokens_head(3, after="b"), "b": before()})


def test_ctc_in_a_model_of_time_first_has_the_loss_of_batch_first():
    tokens, targets = torch.randint(VOCABULARY, (B, B)), {"a": torch.tensor([[1], [2], [3], [4]])}
    losses = []
    for batch_first, given in ((True, tokens), (False, tokens.t())):
        torch.manual_seed(0)
        encoder = LSTM(E, H, batch_first=batch_first, bidirectional=True)
        model = MultiTaskModel(nn.Embedding(VOCABULARY, E), encoder, {"a": CTCHead(5)})
        losses.append(JointLoss({"a": 1.0}, model.losses)(model(given), targets).total)
    torch.testing.assert_close(*losses)
