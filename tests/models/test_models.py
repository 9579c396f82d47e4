import copy

import pytest
import torch
import torch.nn.functional as F
from parity import assert_parity, assert_same_bits
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import pymtl
from pymtl import (
    LSTM,
    BinaryCrossEntropy,
    ClassificationHead,
    CrossEntropy,
    JointLoss,
    MultiLabelHead,
    MultiTaskModel,
    RegressionHead,
    TokenClassificationHead,
)
from pymtl.training.reference_model import MultiTaskModel as ReferenceModel

VOCABULARY, E, H = 30, 9, 11
LENGTHS = [4, 7, 1, 5, 2]  # all different: nobody orders ties
B, T = len(LENGTHS), 7
HEADS = {
    "tokens and last": {"intent": lambda: ClassificationHead(4), "slots": lambda: TokenClassificationHead(6)},
    "tokens alone": {"slots": lambda: TokenClassificationHead(6)},
    "last alone": {"intent": lambda: ClassificationHead(4)},
    "mean alone": {"intent": lambda: ClassificationHead(4, pooling="mean")},
    "max alone": {"intent": lambda: ClassificationHead(4, pooling="max")},
    "everything mixed": {
        "slots": lambda: TokenClassificationHead(6, CrossEntropy(label_smoothing=0.1)),
        "mean": lambda: ClassificationHead(4, "mean", CrossEntropy(weight=(1.0, 0.5, 2.0, 1.0))),
        "score": lambda: RegressionHead(2, "max"),
        "parts": lambda: TokenClassificationHead(3),
        "intent": lambda: ClassificationHead(5),
        "tags": lambda: MultiLabelHead(3, "mean", BinaryCrossEntropy(weight=(1.0, 2.0, 0.5))),
        "other": lambda: RegressionHead(1, "last"),
        "top": lambda: ClassificationHead(2, "max"),
    },
}
ENCODERS = {
    "bidirectional": {"bidirectional": True},
    "unidirectional": {},
    "2 layers": {"bidirectional": True, "num_layers": 2},
    "no bias": {"bidirectional": True, "bias": False},
    "GRU": {"kind": "GRU", "bidirectional": True, "num_layers": 2},
    "RNN": {"kind": "RNN"},
}
every_heads = pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
every_encoder = pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)
BIDIRECTIONAL, MIXED = ENCODERS["bidirectional"], HEADS["everything mixed"]


def models(encoder=BIDIRECTIONAL, heads=MIXED):
    """Ours and the plain one, of the same weights."""
    made = []
    options = dict(encoder)
    kind = options.pop("kind", "LSTM")
    for model, modules in ((MultiTaskModel, pymtl), (ReferenceModel, nn)):
        embedding = nn.Embedding(VOCABULARY, E, padding_idx=0)
        layers = getattr(modules, kind)(E, H, batch_first=True, **options)
        made.append(model(embedding, layers, {t: make() for t, make in heads.items()}))
    made[1].load_state_dict(made[0].state_dict())
    return made


def batch():
    """Token ids and lengths; the padding holds ids too, to be sure that nobody reads it."""
    return torch.randint(VOCABULARY, (B, T)), torch.tensor(LENGTHS)


VALID = torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(1)


def targets_of(model):
    """Targets of every head, some of them missing; none at padding."""
    targets = {}
    for task, head in model.heads.items():
        if head.pooling is None:
            targets[task] = torch.randint(head.out_features, (B, T)).masked_fill(~VALID, -100)
            targets[task][1, 2] = -100
        elif isinstance(head, ClassificationHead):
            targets[task] = torch.randint(head.out_features, (B,))
            targets[task][0] = -100
        else:
            targets[task] = torch.rand(B, head.out_features)
            targets[task][2] = torch.nan
    return targets


def plain_loss(logits, targets, losses, weights):
    total = 0.0
    for task, y in targets.items():
        z, loss = logits[task], losses[task]
        weight = None if loss.weight is None else z.new_tensor(loss.weight)
        known = ~y.isnan()
        y = y.to(z.dtype) if y.is_floating_point() else y
        if loss.kind == "cross_entropy":
            z = z.flatten(0, -2)
            value = F.cross_entropy(z, y.flatten(), weight, label_smoothing=loss.label_smoothing)
        elif loss.kind == "mean_squared_error":
            value = F.mse_loss(z[known], y[known])
        else:
            weight = None if weight is None else weight.expand_as(y)[known]
            value = F.binary_cross_entropy_with_logits(z[known], y[known], pos_weight=weight)
        total = total + weights[task] * value
    return total


def results(model, tokens, lengths, loss):
    """Logits of every task (tokens only, no padding), the loss and the gradients of all parameters."""
    logits = model(tokens, lengths)
    total = loss(logits)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(total, list(parameters.values()))
    named = {task: z.detach()[VALID] if z.dim() == 3 else z.detach() for task, z in logits.items()}
    return named | {"loss": total.detach()} | {f"gradient of {n}": g for n, g in zip(parameters, gradients)}


def loss_weights(model):
    return {task: 0.5 + k for k, task in enumerate(model.heads)}


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@every_encoder
def test_logits_loss_and_all_gradients_are_those_of_the_plain_model(encoder, heads):
    ours, plain = models(encoder, heads)
    tokens, lengths = batch()
    targets, weights = targets_of(ours), loss_weights(ours)
    joint = JointLoss(weights, ours.losses)

    def reference_loss(logits):
        return plain_loss(logits, targets, ours.losses, weights)

    actual = results(ours, tokens, lengths, lambda logits: joint(logits, targets).total)
    expected = results(plain, tokens, lengths, reference_loss)
    truth = results(copy.deepcopy(plain).double(), tokens, lengths, reference_loss)
    assert_parity(actual, expected, truth)


@every_heads
@every_encoder
def test_inference_gives_the_bits_of_training(encoder, heads):
    model, _ = models(encoder, heads)
    tokens, lengths = batch()
    training = model(tokens, lengths)
    for mode in (model.train(), model.eval()):
        with torch.no_grad():
            assert_same_bits(mode(tokens, lengths), training)
        with torch.inference_mode():
            assert_same_bits(mode(tokens, lengths), training)
        assert_same_bits(mode(tokens, lengths), training)


@pytest.mark.parametrize("enforce_sorted", [False, True], ids=["unsorted", "sorted"])
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_a_packed_sequence_gives_the_bits_of_a_padded_batch(gradients, enforce_sorted):
    model, _ = models()
    tokens, lengths = batch()
    if enforce_sorted:
        lengths, order = lengths.sort(descending=True)
        tokens = tokens[order]
    with torch.set_grad_enabled(gradients):
        padded = model(tokens, lengths)
        packed = model(pack_padded_sequence(tokens, lengths, True, enforce_sorted))
    for task, value in packed.items():
        assert isinstance(value, PackedSequence) == (model.heads[task].pooling is None)
        if isinstance(value, PackedSequence):
            packed[task], counts = pad_packed_sequence(value, True)
            assert torch.equal(counts, lengths)
    assert_same_bits(packed, padded)


def test_a_packed_loss_has_the_value_and_gradients_of_the_padded_one():
    model, _ = models()
    tokens, lengths = batch()
    targets = targets_of(model)
    joint = JointLoss(loss_weights(model), model.losses)
    packed_targets = {
        t: pymtl.pack(y, lengths, batch_first=True) if y.shape == (B, T) else y for t, y in targets.items()
    }
    values = []
    for given, wanted in ((tokens, targets), (pymtl.pack(tokens, lengths, batch_first=True), packed_targets)):
        total, per_task, *_ = joint(model(given, lengths if given is tokens else None), wanted)
        parameters = dict(model.named_parameters())
        gradients = dict(zip(parameters, torch.autograd.grad(total, list(parameters.values()))))
        values.append(({"total": total} | per_task, gradients))
    model.double()
    total, per_task, *_ = joint(model(tokens, lengths), targets)
    truth = {"total": total} | per_task
    assert_parity(*({n: v.detach() for n, v in x.items()} for x in (values[1][0], values[0][0], truth)))
    gradients = dict(zip(parameters, torch.autograd.grad(total, list(model.parameters()))))
    assert_parity(values[1][1], values[0][1], gradients)


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_a_sequence_gives_the_same_bits_alone_and_at_any_padding(gradients, threads):
    model, _ = models(ENCODERS["2 layers"])
    tokens, lengths = batch()
    with torch.set_grad_enabled(gradients):
        whole = model(tokens, lengths)
        for count in (1, 2):
            threads(count)
            longer = model(F.pad(tokens, (0, 5), value=3), lengths)
            for task, z in whole.items():
                assert_same_bits({task: longer[task][:, :T] if z.dim() == 3 else longer[task]}, {task: z})
        for b, length in enumerate(LENGTHS):
            alone = model(tokens[b : b + 1, :length])
            for task, z in whole.items():
                assert_same_bits({task: alone[task][0]}, {task: z[b, :length] if z.dim() == 3 else z[b]})


def test_token_logits_are_zero_at_padding_and_have_no_gradient_from_it():
    model, _ = models()
    tokens, lengths = batch()
    logits = model(tokens, lengths)
    for task in ("slots", "parts"):
        assert not logits[task][~VALID].any()
    sum(logits[task][~VALID].sum() for task in ("slots", "parts")).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_layouts_of_the_output():
    for batch_first in (True, False):
        heads = {task: make() for task, make in MIXED.items()}
        model = MultiTaskModel(nn.Embedding(VOCABULARY, E), LSTM(E, H, batch_first=batch_first), heads)
        tokens, lengths = batch()
        logits = model(tokens if batch_first else tokens.t(), lengths)
        assert list(logits) == list(MIXED)
        for task, head in model.heads.items():
            rows = ((B, T) if batch_first else (T, B)) if head.pooling is None else (B,)
            assert logits[task].shape == (*rows, head.out_features)


def test_time_first_gives_the_bits_of_batch_first():
    model, _ = models()
    tokens, lengths = batch()
    expected = model(tokens, lengths)
    model.encoder.batch_first = False
    actual = model(tokens.t(), lengths)
    for task, z in expected.items():
        assert_same_bits({task: actual[task].transpose(0, 1) if z.dim() == 3 else actual[task]}, {task: z})


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_ids_at_padding_may_be_anything_and_ids_may_be_int32(gradients):
    model, _ = models()
    tokens, lengths = batch()
    with torch.set_grad_enabled(gradients):
        expected = model(tokens, lengths)
        assert_same_bits(model(tokens.masked_fill(~VALID, -1), lengths), expected)
        assert_same_bits(model(tokens.int(), lengths), expected)


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_an_empty_batch_gives_empty_logits(gradients):
    model, _ = models()
    with torch.set_grad_enabled(gradients):
        logits = model(torch.zeros(0, T).long(), [])
    for task, head in model.heads.items():
        assert logits[task].shape == ((0, T) if head.pooling is None else (0,)) + (head.out_features,)


def test_no_lengths_means_that_all_sequences_are_of_full_length():
    model, _ = models()
    tokens, _ = batch()
    assert_same_bits(model(tokens), model(tokens, [T] * B))
    assert_same_bits(model(tokens), model(tokens, torch.full((B,), T)))


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_features_instead_of_tokens(gradients):
    with_embedding, _ = models()
    model = MultiTaskModel(None, with_embedding.encoder, dict(with_embedding.heads.items()))
    tokens, lengths = batch()
    features = with_embedding.embedding(tokens)
    with torch.set_grad_enabled(gradients):
        expected = with_embedding(tokens, lengths)
        assert_same_bits(model(features, lengths), expected)
        packed = model(pack_padded_sequence(features, lengths, True, enforce_sorted=False))
        assert_same_bits({"intent": packed["intent"]}, {"intent": expected["intent"]})


def test_a_gradient_reaches_features():
    model = MultiTaskModel(None, LSTM(E, H, batch_first=True), {"slots": TokenClassificationHead(3)})
    model.requires_grad_(False)
    x = torch.randn(B, T, E, requires_grad=True)
    model(x, LENGTHS)["slots"].sum().backward()
    assert x.grad[VALID].any(-1).all()
    assert not x.grad[~VALID].any()


def test_float64_gives_float64_and_the_bits_of_inference():
    model = models()[0].double()
    tokens, lengths = batch()
    logits = model(tokens, lengths)
    assert {z.dtype for z in logits.values()} == {torch.float64}
    with torch.no_grad():
        assert_same_bits(model(tokens, lengths), logits)


def test_torchs_own_path_gives_the_numbers_of_the_plain_model():
    ours, plain = (model.half() for model in models(heads=HEADS["tokens and last"]))
    tokens, lengths = batch()
    actual, expected = ours(tokens, lengths), plain(tokens, lengths)
    assert actual["slots"].dtype == torch.half
    assert torch.equal(actual["slots"][VALID], expected["slots"][VALID])
    assert torch.equal(actual["intent"], expected["intent"])


def test_every_head_trains_under_autocast():
    model, _ = models()
    tokens, lengths = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens, lengths)
    logits = {task: z.float() for task, z in logits.items()}
    JointLoss(loss_weights(model), model.losses)(logits, targets_of(model)).total.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_an_encoder_with_projections_works():
    encoder = LSTM(E, H, proj_size=4, bidirectional=True, batch_first=True)
    heads = {task: make() for task, make in HEADS["tokens and last"].items()}
    model = MultiTaskModel(nn.Embedding(VOCABULARY, E), encoder, heads)
    tokens, lengths = batch()
    packed = pymtl.pack(tokens, lengths, batch_first=True)
    states, (h, _) = encoder(PackedSequence(model.embedding(packed.data), packed.batch_sizes))
    logits = model(packed)
    slots, intent = model.heads["slots"], model.heads["intent"]
    assert torch.equal(logits["slots"].data, F.linear(states.data, slots.weight, slots.bias))
    last = F.linear(torch.cat(tuple(h), -1), intent.weight, intent.bias)
    assert torch.equal(logits["intent"], last[packed.unsorted_indices])
    padded = model(tokens, lengths)
    with torch.no_grad():
        assert_same_bits(model(tokens, lengths), padded)


# Refusals.


def encoder_and_heads():
    return {"encoder": LSTM(E, H, batch_first=True), "heads": {"intent": ClassificationHead(3)}}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"encoder": nn.LSTM(E, H)}, TypeError, r"encoder: expected a pymtl.LSTM, GRU or RNN .*, got LSTM"),
        ({"encoder": nn.GRU(E, H)}, TypeError, "got GRU"),
        ({"heads": {}}, ValueError, "at least one head"),
        ({"heads": {"a": nn.Linear(H, 2)}}, TypeError, r"heads\['a'\]: expected a pymtl head, got Linear"),
        ({"heads": {"a.b": ClassificationHead(2)}}, ValueError, "heads: .* got 'a.b'"),
        ({"heads": {"": ClassificationHead(2)}}, ValueError, "heads: .* got ''"),
        ({"heads": {"keys": ClassificationHead(2)}}, ValueError, "keys"),
        ({"heads": {"a": ClassificationHead(2, in_features=5)}}, ValueError, "encoder of 5 features, got 11"),
        (
            {"heads": {"b": ClassificationHead(2, pymtl.AttentionPooling(3))}},
            ValueError,
            r"heads\['b'\]: num_heads: expected a divisor of 11 features, got 3",
        ),
        ({"dropout": 1.5}, ValueError, "dropout: .* got 1.5"),
        ({"dropout": -0.1}, ValueError, "dropout"),
        ({"dropout": float("nan")}, ValueError, "dropout"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_constructor_refuses_what_does_not_fit(change, error, message):
    with pytest.raises(error, match=message):
        MultiTaskModel(nn.Embedding(VOCABULARY, E), **(encoder_and_heads() | change))


BAD_INPUT = {
    "rank 1": ((torch.zeros(T).long(),), ValueError, "tokens: expected a 2-D padded batch, got 1-D"),
    "rank 3": ((torch.zeros(B, T, E).long(),), ValueError, "tokens: expected a 2-D padded batch, got 3-D"),
    "unknown id": ((torch.full((B, T), VOCABULARY),), IndexError, "out of range"),
    "too few lengths": ((torch.zeros(B, T).long(), [1, 2]), RuntimeError, "lengths: expected 5 lengths, .* got 2"),
    "length 0": ((torch.zeros(2, T).long(), [1, 0]), RuntimeError, "lengths: expected lengths from 1 to 7.* got 0"),
    "length 8": ((torch.zeros(2, T).long(), [8, 1]), RuntimeError, "lengths: expected lengths from 1 to 7.* got 8"),
    "2-D lengths": ((torch.zeros(2, T).long(), torch.ones(2, 1).long()), RuntimeError, "lengths: .* got a 2D"),
    "lengths twice": ((pymtl.pack(torch.zeros(T, 2).long(), [7, 1]), [7, 1]), ValueError, "lengths: expected none"),
}


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("arguments", "error", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_refused_by_name(arguments, error, message, gradients):
    model = MultiTaskModel(nn.Embedding(VOCABULARY, E), **encoder_and_heads())
    with torch.set_grad_enabled(gradients), pytest.raises(error, match=message):
        model(*arguments)


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_features_that_do_not_fit_are_refused(gradients):
    model = MultiTaskModel(None, **encoder_and_heads())
    refused = [
        (torch.randn(B, T), ValueError, "tokens: expected a 3-D padded batch, got 2-D"),
        (torch.randn(B, T, E + 1), RuntimeError, f"{E}.*{E + 1}"),
        (torch.randn(B, T, E).double(), (RuntimeError, ValueError), "dtype"),
        (torch.ones(B, T, E).long(), (RuntimeError, ValueError), "dtype"),
    ]
    for features, error, message in refused:
        with torch.set_grad_enabled(gradients), pytest.raises(error, match=message):
            model(features)


class Doubled(LSTM):
    def forward(self, *args, **kwargs):
        output, state = super().forward(*args, **kwargs)
        return output._replace(data=2 * output.data), state


class Squashed(ClassificationHead):
    def forward(self, features):
        return super().forward(features).tanh()


def test_an_encoder_with_a_forward_of_its_own_is_called_with_and_without_gradients():
    tokens = torch.randint(1, VOCABULARY, (B, T))
    heads = {"slots": TokenClassificationHead(6)}
    model = MultiTaskModel(nn.Embedding(VOCABULARY, E), Doubled(E, H, batch_first=True), heads).eval()
    with_gradient = model(tokens, LENGTHS)["slots"].detach()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, LENGTHS)["slots"], with_gradient)
        plain = LSTM(E, H, batch_first=True)
        plain.load_state_dict(model.encoder.state_dict())
        model.encoder = plain
        assert not torch.allclose(model(tokens, LENGTHS)["slots"], with_gradient)
        plain.forward = lambda *a, **k: Doubled.forward(model_encoder, *a, **k)
        model_encoder = Doubled(E, H, batch_first=True)
        model_encoder.load_state_dict(plain.state_dict())
        torch.testing.assert_close(model(tokens, LENGTHS)["slots"], with_gradient)


@pytest.mark.parametrize("gradient", [True, False])
def test_a_head_with_a_forward_of_its_own_is_called(gradient):
    tokens = torch.randint(1, VOCABULARY, (B, T))
    heads = {"a": Squashed(4), "b": ClassificationHead(3)}
    model = MultiTaskModel(nn.Embedding(VOCABULARY, E), LSTM(E, H, batch_first=True), heads).eval()
    with torch.set_grad_enabled(gradient):
        squashed = model(tokens, LENGTHS)["a"]
        plain = ClassificationHead(4, in_features=H)
        plain.load_state_dict(heads["a"].state_dict())
        model.heads["a"] = plain
        torch.testing.assert_close(squashed, model(tokens, LENGTHS)["a"].tanh())


def test_a_backward_pre_hook_of_a_head_is_called():
    model = MultiTaskModel(None, LSTM(E, H), {"a": ClassificationHead(4)})
    model.heads["a"].register_full_backward_pre_hook(lambda module, grads: tuple(0 * g for g in grads))
    model(torch.randn(T, B, E))["a"].sum().backward()
    assert not model.heads["a"].bias.grad.any()


def test_heads_take_the_encoder_s_dtype():
    model = MultiTaskModel(None, LSTM(E, H, dtype=torch.float64), {"a": ClassificationHead(4)})
    assert model(torch.randn(T, B, E, dtype=torch.float64))["a"].dtype == torch.float64


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("shape", [(3, 0), (0, 0)])
def test_no_steps_are_refused(shape, gradient):
    model = MultiTaskModel(nn.Embedding(9, E), LSTM(E, H, batch_first=True), {"a": ClassificationHead(4)})
    with torch.set_grad_enabled(gradient), pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
        model(torch.zeros(shape, dtype=torch.int64))


def test_an_empty_batch_of_another_dtype_pools_to_nothing():
    model = MultiTaskModel(None, LSTM(E, H, dtype=torch.bfloat16), {"a": ClassificationHead(4, "mean")})
    assert model(torch.randn(T, 0, E, dtype=torch.bfloat16))["a"].shape == (0, 4)


def test_a_checkpoint_of_model_and_loss_gives_the_same_gradients():
    torch.manual_seed(0)
    model = MultiTaskModel(None, LSTM(E, H, bidirectional=True), {t: make() for t, make in MIXED.items()}, dropout=0.3)
    joint = JointLoss({"slots": 0.5, "intent": 0.5}, {t: model.losses[t] for t in ("slots", "intent")})
    x = torch.randn(T, B, E, requires_grad=True)
    targets = {"slots": torch.randint(6, (T, B)), "intent": torch.randint(5, (B,))}

    def loss(x):
        logits = model(x)
        return joint({task: logits[task] for task in targets}, targets).total

    gradients = []
    for run in (loss, lambda x: checkpoint(loss, x, use_reentrant=False)):
        torch.manual_seed(1)
        x.grad = None
        run(x).backward()
        gradients.append({"x": x.grad})
    assert_same_bits(*gradients)
