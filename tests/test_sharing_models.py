"""The sharing schemes inside a multi-task model."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from parity import assert_same_bits
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import pymtl
from pymtl import (
    LSTM,
    AttentionPooling,
    ClassificationHead,
    JointLoss,
    LanguageModelHead,
    MultiTaskModel,
    Reads,
    RegressionHead,
    TokenClassificationHead,
)
from pymtl.balancing import Balancing
from pymtl.sharing import SCHEMES, HardSharing, SharingResult, SoftSharing

VOCABULARY, E, H = 20, 5, 6
LENGTHS = [4, 7, 1, 5, 2]
B, T = len(LENGTHS), 7
VALID = torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(1)
HEADS = {
    "intent": lambda: ClassificationHead(4),
    "slots": lambda: TokenClassificationHead(5),
    "score": lambda: RegressionHead(2, "max"),
    "tone": lambda: ClassificationHead(3, AttentionPooling(2)),
}
TASKS = list(HEADS)
VARIANTS = {
    "hard": ("hard", {"num_layers": 2}),
    "soft": ("soft", {"num_layers": 2}),
    "soft, trace norm": ("soft", {"penalty": "trace_norm"}),
    "soft, representations": ("soft", {"penalty": "representations"}),
    "shared_private": ("shared_private", {"adversarial": 0.1}),
    "hierarchical": ("hierarchical", {"levels": {"intent": 2, "slots": 1, "score": 2, "tone": 3}}),
    "cross_stitch": ("cross_stitch", {"num_layers": 2}),
    "mmoe": ("mmoe", {"num_layers": 2}),
    "cgc": ("cgc", {}),
    "cgc, 2 levels": ("cgc", {"num_layers": 2, "num_experts": 2}),
    "task_attention": ("task_attention", {"num_layers": 2}),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
both_modes = pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])


def model_of(variant, heads=HEADS, dtype=torch.float64, dropout=0.0, seed=0, **more):
    name, options = VARIANTS[variant]
    torch.manual_seed(seed)
    encoder = SCHEMES[name](list(heads), E, H, **(options | more))
    made = {task: make() for task, make in heads.items()}
    return MultiTaskModel(nn.Embedding(VOCABULARY, E, padding_idx=0), encoder, made, dropout).to(dtype)


def levels_of(variant, count=2):
    """The option that a hierarchy of the first tasks needs."""
    levels = {"intent": 2, "slots": 1, "score": 2}
    return {"levels": {task: levels[task] for task in TASKS[:count]}} if variant == "hierarchical" else {}


def batch(seed=3):
    """Token ids and lengths; the padding holds ids too, to be sure that nobody reads it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (B, T), generator=generator), torch.tensor(LENGTHS)


def targets(tasks=TASKS):
    generator = torch.Generator().manual_seed(4)
    every = {
        "intent": torch.randint(4, (B,), generator=generator),
        "slots": torch.randint(5, (B, T), generator=generator).masked_fill(~VALID, -100),
        "score": torch.randn(B, 2, generator=generator),
        "tone": torch.randint(3, (B,), generator=generator),
    }
    return {task: every[task] for task in tasks}


def joint_loss(model, balancing=None):
    return JointLoss({task: 0.5 + k for k, task in enumerate(model.heads)}, model.losses, balancing)


def close(actual, expected):
    torch.testing.assert_close(dict(actual), dict(expected))


def in_all_ways(model, *arguments, **options):
    """The logits with gradients, without, and in evaluation."""
    found = [model.train()(*arguments, **options)]
    with torch.no_grad():
        found.append(model(*arguments, **options))
    with torch.inference_mode():
        found.append(model.eval()(*arguments, **options))
    model.train()
    return found


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


@pytest.mark.parametrize("variant", [pytest.param(v) for v in VARIANTS])
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


KINDS = {name: VARIANTS[name][0] for name in VARIANTS}


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


# Copies.


@every_variant
@both_modes
def test_copies_give_the_same_bits(variant, gradients):
    model = model_of(variant, dtype=torch.float32)
    tokens, lengths = batch()
    loaded = model_of(variant, dtype=torch.float32, seed=1)
    assert not torch.equal(loaded(tokens, lengths)["slots"], model(tokens, lengths)["slots"])
    loaded.load_state_dict(model.state_dict())
    with torch.set_grad_enabled(gradients):
        expected = model(tokens, lengths)
        for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            logits = other(tokens, lengths)
            assert_same_bits(logits, expected)
            assert_same_bits(logits.penalties, expected.penalties)


def test_a_copy_is_apart():
    model = model_of("soft")
    other = copy.deepcopy(model)
    tokens, lengths = batch()
    before = model(tokens, lengths)
    with torch.no_grad():
        for parameter in other.encoder.parameters():
            parameter.mul_(2)
    assert_same_bits(model(tokens, lengths), before)
    assert not torch.equal(other(tokens, lengths)["slots"], before["slots"])


@every_variant
def test_float64_is_kept(variant):
    model = model_of(variant)
    logits = model(*batch())
    assert all(z.dtype == torch.float64 for z in logits.values())
    assert all(p.dtype == torch.float64 for p in logits.penalties.values())


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [(v, d) for v in VARIANTS for d in (torch.bfloat16, torch.float32)],
)
def test_bfloat16_and_autocast_run(variant, dtype):
    tokens, lengths = batch()
    expected = model_of(variant, dtype=torch.float32)(tokens, lengths)
    model = model_of(variant, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        logits = model(tokens, lengths)
    for task, z in logits.items():
        torch.testing.assert_close(z.float(), expected[task], rtol=0, atol=0.05)  # 8 bits
    total = sum(z.float().sum() for z in logits.values()) + sum(logits.penalties.values())
    total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# Training.


@every_variant
def test_every_parameter_gets_a_gradient(variant):
    model = model_of(variant)
    joint = joint_loss(model)
    tokens, lengths = batch()
    joint(model(tokens, lengths), targets()).total.backward()
    missing = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # The adversary hears of batches of some tasks.
    assert missing == ({f"encoder.discriminator.{n}" for n in ("weight", "bias")} if "private" in variant else set())
    joint(model(tokens, lengths, tasks=["intent"]), targets(["intent"])).total.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@every_variant
def test_penalties_are_for_training_with_gradients_and_join_the_total(variant):
    model = model_of(variant)
    joint = joint_loss(model)
    names = {"soft": [VARIANTS[variant][1].get("penalty", "l2")], "shared_private": ["orthogonality", "adversarial"]}
    tokens, lengths = batch()
    for tasks in (TASKS, ["slots", "tone"]):
        logits = model.train()(tokens, lengths, tasks=tasks)
        expected = [n for n in names.get(KINDS[variant], []) if n != "adversarial" or len(tasks) < 4]
        assert list(logits.penalties) == expected
        result = joint(logits, targets(tasks))
        assert result.penalties is logits.penalties
        weighted = sum((0.5 + TASKS.index(t)) * value for t, value in result.per_task.items())
        torch.testing.assert_close(result.total, weighted + sum(logits.penalties.values()))
        if expected:
            ours = torch.autograd.grad(result.total, list(model.parameters()), allow_unused=True, retain_graph=True)
            bare = torch.autograd.grad(
                weighted + sum(logits.penalties.values()), list(model.parameters()), allow_unused=True
            )
            torch.testing.assert_close([g for g in ours if g is not None], [g for g in bare if g is not None])
        assert model.eval()(tokens, lengths, tasks=tasks).penalties == {}
        with torch.no_grad():
            assert model.train()(tokens, lengths, tasks=tasks).penalties == {}


def test_a_task_that_another_reads_after_counts_as_the_batchs_for_the_adversary():
    heads = {
        "slots": lambda: TokenClassificationHead(5),
        "intent": lambda: ClassificationHead(4, reads=Reads(after="slots")),
    }
    model = model_of("shared_private", heads)
    tokens, lengths = batch()
    assert "adversarial" in model(tokens, lengths, tasks=["slots"]).penalties
    assert "adversarial" not in model(tokens, lengths, tasks=["intent"]).penalties


@every_variant
def test_shared_are_the_states_that_all_tasks_read(variant):
    model = model_of(variant)
    tokens, lengths = batch()
    logits = model(tokens, lengths)
    assert (len(logits.shared) > 0) == (variant == "hard")
    if variant == "hard":
        assert [tuple(t.shape) for t in logits.shared] == [(sum(LENGTHS), 2 * H), (B, 2 * H)]
        for task in TASKS:
            grads = torch.autograd.grad(logits[task].sum(), logits.shared, retain_graph=True, allow_unused=True)
            assert any(g is not None and g.any() for g in grads)
    if variant == "hierarchical":
        logits = model(tokens, lengths, tasks=["intent", "score"])  # of one level
    else:
        logits = model(tokens, lengths, tasks=["slots"])
    assert torch.autograd.grad(sum(z.sum() for z in logits.values()), logits.shared[:1])[0].any()
    assert joint_loss(model)(logits, targets(list(logits))).shared is logits.shared


class Aside(Balancing):
    """A method with a backward pass of its own."""

    combines_gradients = True

    def total(self, values, tasks, shared):
        return values.sum()

    def backward(self, losses, shared, parameters):
        sum(losses.values()).backward()


@pytest.mark.parametrize("tasks", [TASKS, ["intent", "slots"], ["slots"]], ids=["all", "two", "one"])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if KINDS[v] in ("soft", "shared_private")])
def test_penalties_join_what_combines_gradients(variant, tasks):
    model = model_of(variant)
    tokens, lengths = batch()
    found = []
    for balancing in (None, Aside(TASKS)):
        model.zero_grad()
        joint = joint_loss(model, balancing)
        joint.backward(joint(model(tokens, lengths, tasks=tasks), targets(tasks)), model.parameters())
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*found)


@every_variant
def test_dropout_follows_the_seed_and_stops_in_evaluation(variant):
    model, without = model_of(variant, dropout=0.4), model_of(variant)
    tokens, lengths = batch()
    close(model.eval()(tokens, lengths), without(tokens, lengths))
    model.train()
    torch.manual_seed(1)
    once = model(tokens, lengths)
    assert not torch.equal(once["slots"], model(tokens, lengths)["slots"])
    torch.manual_seed(1)
    assert_same_bits(model(tokens, lengths), once)


@every_variant
def test_dropping_everything_leaves_the_biases(variant):
    model = model_of(variant, dropout=1.0)
    for task, z in model(*batch()).items():
        z = z[VALID] if z.dim() == 3 else z
        assert torch.equal(z, model.heads[task].bias.expand_as(z))


@pytest.mark.parametrize("variant", ["soft", "hard", "cross_stitch"])
def test_a_few_steps_of_training_lower_the_loss(variant):
    model = model_of(variant)
    joint = joint_loss(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    tokens, lengths = batch()
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        total = joint(model(tokens, lengths), targets()).total
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < 0.5 * losses[0]


# Hard sharing and a plain LSTM.


@both_modes
def test_hard_sharing_gives_the_bits_of_a_plain_lstm(gradients):
    model = model_of("hard", dtype=torch.float32)
    plain = MultiTaskModel(model.embedding, model.encoder.encoder, dict(model.heads.items()))
    tokens, lengths = batch()
    with torch.set_grad_enabled(gradients):
        logits, expected = model(tokens, lengths), plain(tokens, lengths)
    assert_same_bits(logits, expected)
    assert len(logits.shared) == len(expected.shared)


def test_hard_sharing_without_gradients_has_the_bits_of_training():
    plain = {task: HEADS[task] for task in ("intent", "slots", "score")}  # attention takes the states
    model = model_of("hard", plain, torch.float32)
    tokens, lengths = batch()
    first, *others = in_all_ways(model, tokens, lengths)
    for logits in others:
        assert_same_bits(logits, first)


class Doubled(HardSharing):
    def run(self, data, batch_sizes, tasks):
        states = super().run(data, batch_sizes, tasks).states
        return SharingResult({t: s.map(lambda x: 2 * x, with_last=True) for t, s in states.items()}, {})


class Forwarded(HardSharing):
    def forward(self, data, batch_sizes, tasks=None):
        states = super().forward(data, batch_sizes, tasks).states
        return SharingResult({t: s.map(lambda x: 2 * x, with_last=True) for t, s in states.items()}, {})


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(Doubled),
        Forwarded,
    ],
)
def test_a_scheme_derived_from_hard_sharing_is_run_with_and_without_gradients(kind):
    heads = {"intent": ClassificationHead(4), "slots": TokenClassificationHead(5)}
    model = MultiTaskModel(nn.Embedding(VOCABULARY, E), kind(list(heads), E, H), heads)
    first, *others = in_all_ways(model, *batch())
    for logits in others:
        close(logits, first)


@pytest.mark.parametrize("where", ["scheme", "lstm"])
def test_a_forward_hook_is_called_with_and_without_gradients(where):
    model = model_of("hard", {"slots": HEADS["slots"]})
    calls = []
    module = model.encoder if where == "scheme" else model.encoder.encoder
    module.register_forward_hook(lambda *_: calls.append(1))
    in_all_ways(model, *batch())
    assert len(calls) == 3


# Frozen, compiled.


@every_variant
def test_frozen_weights_give_the_same_bits_and_changes_are_seen(variant):
    model = model_of(variant, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"freeze: .* eval\(\) first"):
        pymtl.freeze(model)
    model.eval()
    tokens, lengths = batch()
    with torch.no_grad():
        before = model(tokens, lengths)
        assert pymtl.freeze(model) is model
        assert_same_bits(model(tokens, lengths), before)
        for parameter in model.encoder.parameters():
            parameter.mul_(0.5)
        changed = model(tokens, lengths)
        assert not torch.equal(changed["slots"], before["slots"])
        assert_same_bits(pymtl.unfreeze(model)(tokens, lengths), changed)
        assert_same_bits(copy.deepcopy(pymtl.freeze(model))(tokens, lengths), changed)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_soft_sharing_model_agrees():
    torch._dynamo.reset()
    model = model_of("soft", {task: HEADS[task] for task in ("intent", "slots")})
    compiled = torch.compile(model, backend="aot_eager")
    tokens, lengths = batch()
    found = []
    for run in (model, compiled):
        model.zero_grad()
        logits = run(tokens, lengths)
        assert list(logits.penalties) == ["l2"]
        total = joint_loss(model)(logits, targets(["intent", "slots"])).total
        total.backward()
        found.append(dict(logits) | {"total": total} | {n: p.grad.clone() for n, p in model.named_parameters()})
    torch.testing.assert_close(found[1], found[0])
    torch._dynamo.reset()


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
