"""The sharing schemes inside a multi-task model: whose logits come from what."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from parity import assert_same_bits
from sharing_models import (
    HEADS,
    LENGTHS,
    TASKS,
    VALID,
    VARIANTS,
    VOCABULARY,
    B,
    E,
    H,
    T,
    batch,
    both_modes,
    close,
    every_variant,
    in_all_ways,
    levels_of,
    model_of,
)
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from pymtl import (
    LSTM,
    ClassificationHead,
    LanguageModelHead,
    MultiTaskModel,
    Reads,
    RegressionHead,
    TokenClassificationHead,
)
from pymtl.sharing import SCHEMES, SoftSharing


@every_variant
def test_logits_are_linear_maps_of_each_sequence_s_own_states(variant):
    model = model_of(variant)
    tokens, lengths = batch()
    logits = model(tokens, lengths)
    for b, length in enumerate(LENGTHS):
        embedded = F.embedding(tokens[b, :length], model.embedding.weight)
        states = model.encoder(embedded, torch.ones(length, dtype=torch.int64)).states
        for task, head in model.heads.items():
            own = states[task].tokens
            if task == "intent":
                features = torch.cat([own[-1, : own.shape[1] // 2], own[0, own.shape[1] // 2 :]])
            elif task == "score":
                features = own.amax(0)
            elif task == "tone":
                weights = (torch.tanh(own @ head.attention.weight.t()) @ head.attention.query.t()).softmax(0)
                features = torch.cat([(weights[:, j : j + 1] * part).sum(0) for j, part in enumerate(own.chunk(2, 1))])
            else:
                features = own
            actual = logits[task][b, :length] if task == "slots" else logits[task][b]
            torch.testing.assert_close(actual, F.linear(features, head.weight, head.bias))
    assert not logits["slots"][~VALID].any()


@every_variant
@pytest.mark.parametrize("enforce_sorted", [False, True], ids=["unsorted", "sorted"])
def test_padded_and_packed_input_agree(variant, enforce_sorted):
    model = model_of(variant)
    tokens, lengths = batch()
    if enforce_sorted:
        lengths, order = lengths.sort(descending=True)
        tokens = tokens[order]
    for padded, packed in zip(
        in_all_ways(model, tokens, lengths),
        in_all_ways(model, pack_padded_sequence(tokens, lengths, True, enforce_sorted)),
    ):
        assert isinstance(packed["slots"], PackedSequence)
        packed["slots"], counts = pad_packed_sequence(packed["slots"], True)
        assert torch.equal(counts, lengths)
        close(packed, padded)


@every_variant
def test_the_ways_to_run_it_and_more_padding_agree(variant):
    model = model_of(variant)
    tokens, lengths = batch()
    expected = model(tokens, lengths)
    for logits in in_all_ways(model, tokens, lengths):
        close(logits, expected)
    for logits in in_all_ways(model, F.pad(tokens, (0, 3), value=2), lengths):
        logits["slots"] = logits["slots"][:, :T]
        close(logits, expected)


@every_variant
def test_time_first_agrees_with_batch_first(variant):
    model = model_of(variant)
    tokens, lengths = batch()
    expected = model(tokens, lengths)
    model.encoder.batch_first = False
    actual = model(tokens.t(), lengths)
    actual["slots"] = actual["slots"].transpose(0, 1)
    close(actual, expected)


@every_variant
def test_logits_come_in_the_order_asked_for(variant):
    plain = {task: HEADS[task] for task in ("intent", "slots")}
    model = model_of(variant, plain, **levels_of(variant))
    for logits in in_all_ways(model, *batch(), tasks=["slots", "intent"]):
        assert list(logits) == ["slots", "intent"]


READING = HEADS | {
    "score": lambda: RegressionHead(2, "max", reads=Reads(skip=True, after="slots", label_embedding_dim=3)),
    "tone": lambda: ClassificationHead(3, "mean", reads=Reads(after="intent", label_embedding_dim=2)),
}


@every_variant
@pytest.mark.parametrize("heads", [HEADS, READING], ids=["plain", "reading"])
def test_some_tasks_have_the_logits_they_have_among_all(variant, heads):
    model = model_of(variant, heads)
    tokens, lengths = batch()
    expected = model(tokens, lengths)
    for count in (1, 2, 3, 4):
        for tasks in itertools.combinations(reversed(TASKS), count):
            for logits in in_all_ways(model, tokens, lengths, tasks=tasks):
                assert set(logits) == set(tasks)
                close(logits, {task: expected[task] for task in tasks})


@every_variant
@both_modes
def test_a_sequence_does_not_depend_on_the_others(variant, gradients):
    # float32, where another order of summing shows; schemes of nothing but LSTMs and heads promise the bits.
    model = model_of(
        variant, {t: HEADS[t] for t in ("intent", "slots", "score")}, torch.float32, **levels_of(variant, 3)
    )
    exact = variant == "hard" or variant.startswith("soft")
    tokens, lengths = batch()
    with torch.set_grad_enabled(gradients):
        whole = model(tokens, lengths)
        changed = model(torch.cat([tokens[:2], tokens[2:].flip(1)]), lengths)
        for b, length in enumerate(LENGTHS):
            alone = model(tokens[b : b + 1, :length])
            for task, z in whole.items():
                ours, own = (z[b, :length], alone[task][0]) if task == "slots" else (z[b], alone[task][0])
                torch.testing.assert_close(own, ours)
                if exact:
                    assert_same_bits({task: own}, {task: ours})
                if b < 2:
                    torch.testing.assert_close(changed[task][b], z[b])
                    if exact:
                        assert_same_bits({task: changed[task][b]}, {task: z[b]})


@every_variant
def test_a_sequence_s_loss_has_no_gradient_at_the_others(variant):
    model = model_of(variant)
    model.embedding = None
    features = torch.randn(B, T, E, dtype=torch.float64, requires_grad=True)
    sum(z[1].sum() for z in model(features, LENGTHS).values()).backward()
    assert features.grad[1].any()
    features.grad[1] = 0
    assert not features.grad.any()


@pytest.mark.parametrize("kind", ["single", "padded", "one step"])
@every_variant
def test_the_smallest_batches(variant, kind):
    model = model_of(variant)
    tokens, lengths = {
        "single": (torch.tensor([[3]]), [1]),
        "padded": (torch.tensor([[3, 4, 5]]), [1]),
        "one step": (torch.tensor([[3], [4]]), [1, 1]),
    }[kind]
    expected = model(torch.tensor([[3]]))
    for logits in in_all_ways(model, tokens, lengths):
        for task, z in logits.items():
            z = z[:1, :1] if task == "slots" else z[:1]
            torch.testing.assert_close(z, expected[task])


@every_variant
@both_modes
def test_an_empty_batch_gives_empty_logits(variant, gradients):
    plain = {task: HEADS[task] for task in ("intent", "slots", "score")}  # attention has its own test
    model = model_of(variant, plain, **levels_of(variant, 3))
    with torch.set_grad_enabled(gradients):
        logits = model(torch.zeros(0, T).long(), [])
        assert {task: tuple(z.shape) for task, z in logits.items()} == {
            "intent": (0, 4),
            "slots": (0, T, 5),
            "score": (0, 2),
        }
        assert all(p.isfinite() for p in logits.penalties.values())
        assert all(p.isfinite() for p in model(torch.zeros(0, T).long(), [], ["slots"]).penalties.values())


@every_variant
def test_no_tasks_are_refused(variant):
    tokens, lengths = batch()
    for model in (
        model_of(variant),
        MultiTaskModel(nn.Embedding(VOCABULARY, E), LSTM(E, H), {"a": ClassificationHead(2)}),
    ):
        with pytest.raises(ValueError, match="tasks: expected at least one task"):
            model(tokens, lengths, tasks=[])


# Refusals.


def test_a_scheme_of_other_tasks_is_refused():
    heads = {"intent": ClassificationHead(4), "slots": TokenClassificationHead(5)}
    for tasks in (["intent"], ["intent", "other"], ["intent", "slots", "third"]):
        with pytest.raises(ValueError, match=r"encoder: expected sharing among the tasks \['intent', 'slots'\], got"):
            MultiTaskModel(nn.Embedding(VOCABULARY, E), SoftSharing(tasks, E, H), heads)
    model = MultiTaskModel(nn.Embedding(VOCABULARY, E), SoftSharing(["slots", "intent"], E, H), heads)
    assert list(model(*batch())) == ["intent", "slots"]


@every_variant
def test_an_unknown_task_is_refused(variant):
    model = model_of(variant)
    with pytest.raises(KeyError, match=r"tasks: unknown task 'other'"):
        model(*batch(), tasks=["intent", "other"])


@every_variant
def test_a_head_of_other_features_is_refused(variant):
    model = model_of(variant)
    heads = {task: make() for task, make in HEADS.items()}
    heads["intent"] = ClassificationHead(4, in_features=3)
    with pytest.raises(ValueError, match=r"encoder of 3 features, got"):
        MultiTaskModel(None, model.encoder, heads)


@every_variant
def test_a_language_model_needs_separate_directions(variant):
    name, options = VARIANTS[variant]
    levels = {"levels": {"words": 1, "top": 2}} if name == "hierarchical" else {}
    encoder = SCHEMES[name](["words", "top"], E, H, **(options | levels))
    for task in ("words", "top"):
        heads = {"words": TokenClassificationHead(3), "top": TokenClassificationHead(3)}
        heads[task] = LanguageModelHead(VOCABULARY)
        if encoder.separates_directions(task):
            MultiTaskModel(nn.Embedding(VOCABULARY, E), encoder, heads)
        else:
            with pytest.raises(ValueError, match=rf"heads\['{task}'\]: expected an encoder of one layer"):
                MultiTaskModel(nn.Embedding(VOCABULARY, E), encoder, heads)
