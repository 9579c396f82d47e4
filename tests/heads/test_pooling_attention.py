"""Attention pooling, against a loop over sequences."""

import copy
import pickle

import pytest
import torch
from parity import assert_parity, assert_same_bits
from torch import nn

from pymtl import LSTM, AttentionPooling, ClassificationHead, MultiTaskModel, RegressionHead
from pymtl.states import States

F = 6
BATCHES = {"ragged": [5, 3, 3, 1], "one sequence": [4], "one step": [1, 1, 1], "one token": [1], "equal": [3, 3]}
every_batch = pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
every_count = pytest.mark.parametrize("num_heads", [1, 3, 6])


def batch(lengths=BATCHES["ragged"], dtype=torch.float64, trailing=0):
    """Packed random states, the batch sizes, and each sequence's rows in the packed order."""
    sizes = [sum(length > t for length in lengths) for t in range(max(lengths))]
    starts = [sum(sizes[:t]) for t in range(len(sizes))]
    rows = [[starts[t] + b for t in range(length)] for b, length in enumerate(lengths)]
    tokens = torch.randn(sum(sizes), F, dtype=dtype, requires_grad=True)
    return tokens, torch.tensor(sizes + [0] * trailing), rows


def pooling(num_heads=1, attention_size=None, dtype=torch.float64):
    module = AttentionPooling(num_heads, attention_size)
    module.materialize(F, torch.empty(0, dtype=dtype))
    return module


def looped(module, tokens, rows):
    """Each head of each sequence alone, in plain PyTorch."""
    slices, results = F // module.num_heads, []
    for own in rows:
        sequence, parts = tokens[own], []
        for j, query in enumerate(module.query):
            scores = torch.stack([query @ torch.tanh(module.weight @ state) for state in sequence])
            weights = scores.softmax(0)
            part = sequence[:, j * slices : (j + 1) * slices]
            parts.append(sum(w * state for w, state in zip(weights, part)))
        results.append(torch.cat(parts))
    return torch.stack(results)


def results(function, module, tokens):
    output = function()
    leaves = {"tokens": tokens} | dict(module.named_parameters())
    seed = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(output.dtype)
    return {"output": output.detach()} | dict(zip(leaves, torch.autograd.grad(output, list(leaves.values()), seed)))


@every_batch
@every_count
@pytest.mark.parametrize("trailing", [0, 2], ids=["", "trailing zeros"])
def test_it_is_a_softmax_over_each_sequence_s_tokens(lengths, num_heads, trailing):
    module = pooling(num_heads)
    tokens, sizes, rows = batch(lengths, trailing=trailing)
    actual = results(lambda: module(States.of(tokens, sizes, 2)), module, tokens)
    torch.testing.assert_close(actual, results(lambda: looped(module, tokens, rows), module, tokens))


@every_count
def test_float32_keeps_the_rule(num_heads):
    tokens, sizes, rows = batch(dtype=torch.float32)
    module = pooling(num_heads, dtype=torch.float32)
    ours = results(lambda: module(States.of(tokens, sizes, 2)), module, tokens)
    plain = results(lambda: looped(module, tokens, rows), module, tokens)
    wide, exact = copy.deepcopy(module).double(), tokens.detach().double().requires_grad_()
    assert_parity(ours, plain, results(lambda: looped(wide, exact, rows), wide, exact))


@pytest.mark.parametrize("num_heads", [1, 3])
def test_its_derivatives_pass_gradcheck(num_heads):
    module = pooling(num_heads, attention_size=2)
    tokens, sizes, _ = batch()
    # gradcheck moves the parameters in place: they are not passed on.
    assert torch.autograd.gradcheck(
        lambda x, *_: module(States.of(x, sizes, 2)), (tokens, *module.parameters()), atol=1e-6
    )


def test_the_size_of_attention_is_free():
    module = pooling(2, attention_size=11)
    assert module.weight.shape == (11, F)
    assert module.query.shape == (2, 11)
    tokens, sizes, rows = batch()
    torch.testing.assert_close(module(States.of(tokens, sizes, 1)), looped(module, tokens, rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_huge_scores_choose_one_token_and_stay_finite(dtype, scale):
    module = pooling(dtype=dtype)
    tokens, sizes, rows = batch(dtype=dtype)
    with torch.no_grad():
        module.query.mul_(scale)
    output = module(States.of(tokens, sizes, 2))
    assert output.isfinite().all()
    grads = torch.autograd.grad(output.sum(), [tokens, *module.parameters()])
    assert all(g.isfinite().all() for g in grads)
    scores = (torch.tanh(tokens @ module.weight.t()) @ module.query.t()).squeeze(1)
    chosen = torch.stack([tokens[own[int(scores[own].argmax())]] for own in rows])
    torch.testing.assert_close(output, chosen)


def test_scores_far_below_zero_stay_finite():
    """Sequences whose scores lie far apart: each has its own largest one."""
    module = pooling()
    with torch.no_grad():
        module.query.fill_(1e3)
        module.weight.fill_(1.0)
    tokens, sizes, rows = batch()
    with torch.no_grad():
        for sign, own in zip((1, -1, 1, -1), rows):
            tokens[own] = sign * tokens[own].abs()
    output = module(States.of(tokens, sizes, 2))
    assert output.isfinite().all()
    torch.testing.assert_close(output, looped(module, tokens, rows))


def test_equal_scores_give_the_mean_and_one_token_itself():
    module = pooling(3)
    with torch.no_grad():
        module.query.zero_()
    tokens, sizes, rows = batch()
    torch.testing.assert_close(module(States.of(tokens, sizes, 2)), torch.stack([tokens[own].mean(0) for own in rows]))
    alone, sizes, _ = batch([1, 1])
    torch.testing.assert_close(pooling(2)(States.of(alone, sizes, 2)), alone, rtol=0, atol=0)


def test_a_head_reads_its_own_slice():
    module = pooling(3)
    tokens, sizes, _ = batch()
    before = module(States.of(tokens, sizes, 2))
    with torch.no_grad():
        module.query[1].add_(1.0)
    changed = (module(States.of(tokens, sizes, 2)) != before).any(0)
    assert changed.tolist() == [False, False, True, True, False, False]


def test_a_sequence_is_pooled_as_if_alone():
    module = pooling(2)
    tokens, sizes, rows = batch()
    whole = module(States.of(tokens, sizes, 2))
    for b, own in enumerate(rows):
        alone = module(States.of(tokens[own], torch.ones(len(own), dtype=torch.int64), 2))
        torch.testing.assert_close(alone[0], whole[b])


@every_count
def test_an_empty_batch_pools_to_nothing(num_heads):
    for sizes in (torch.zeros(3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)):
        assert pooling(num_heads)(States.of(torch.zeros(0, F, dtype=torch.float64), sizes, 2)).shape == (0, F)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_other_dtypes_and_autocast(dtype):
    module = pooling(2, dtype=torch.float32)
    tokens, sizes, rows = batch(dtype=torch.float32)
    expected = looped(module, tokens, rows)
    module.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        output = module(States.of(tokens.to(dtype), sizes, 2))
    # bfloat16 has 8 bits: a few of its steps.
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=0.1)
    output.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("pooling", ["attention", AttentionPooling(3), AttentionPooling(2, 5)], ids=["name", "3", "2"])
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_a_model_pools_unsorted_and_padded_batches(pooling, gradients):
    head = ClassificationHead(4, copy.deepcopy(pooling))
    encoder = LSTM(5, 6, bidirectional=True, batch_first=True)
    model = MultiTaskModel(nn.Embedding(9, 5), encoder, {"a": head}).double()
    tokens, lengths = torch.randint(9, (4, 7)), [3, 6, 1, 4]
    with torch.set_grad_enabled(gradients):
        logits = model(tokens, lengths)["a"]
    attention = head.attention
    slices = 12 // attention.num_heads
    for b, length in enumerate(lengths):
        states = encoder(model.embedding(tokens[b : b + 1, :length]))[0][0]
        weights = (torch.tanh(states @ attention.weight.t()) @ attention.query.t()).softmax(0)
        parts = [
            (weights[:, j : j + 1] * states[:, j * slices : (j + 1) * slices]).sum(0)
            for j in range(attention.num_heads)
        ]
        torch.testing.assert_close(logits[b], torch.cat(parts) @ head.weight.t() + head.bias)


def test_two_heads_may_share_one_attention():
    shared = AttentionPooling(2)
    heads = {"a": ClassificationHead(4, shared), "b": RegressionHead(1, shared)}
    model = MultiTaskModel(nn.Embedding(9, 5), LSTM(5, 6, batch_first=True), heads)
    assert model.heads["a"].attention is model.heads["b"].attention
    assert sum(p is shared.weight for p in model.parameters()) == 1
    logits = model(torch.randint(9, (2, 3)))
    (logits["a"].sum() + logits["b"].sum()).backward()
    assert shared.weight.grad.any()


def test_copies_and_states_of_it_are_the_same():
    module = pooling(3)
    tokens, sizes, _ = batch()
    expected = {"output": module(States.of(tokens, sizes, 2))}
    loaded = pooling(3)
    loaded.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert_same_bits({"output": other(States.of(tokens, sizes, 2))}, expected)
    assert set(module.state_dict()) == {"weight", "query"}
    unsized = copy.deepcopy(AttentionPooling(3))
    unsized.materialize(F)
    assert unsized.weight.shape == (F, F)


@pytest.mark.parametrize("value", [0, -1, 1.5, "2"], ids=repr)
def test_numbers_below_one_are_refused(value):
    with pytest.raises(ValueError, match=f"num_heads: expected a number above 0, got {value!r}"):
        AttentionPooling(value)
    with pytest.raises(ValueError, match=f"attention_size: expected a number above 0, got {value!r}"):
        AttentionPooling(attention_size=value)


def test_no_number_of_heads_is_refused():
    with pytest.raises(ValueError, match="num_heads"):
        AttentionPooling(None)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_heads: expected a divisor of 6 features, got 4"):
        AttentionPooling(4).materialize(F)
    with pytest.raises(ValueError, match="expected states of 6 features, got 12"):
        pooling(3).materialize(12)
    heads = {"a": ClassificationHead(4, AttentionPooling(5))}
    with pytest.raises(ValueError, match="num_heads: expected a divisor of 12 features, got 5"):
        MultiTaskModel(nn.Embedding(9, 5), LSTM(5, 6, bidirectional=True), heads)
    with pytest.raises(ValueError, match=r"pooling: expected one of .*'attention'.*, got 'attend'"):
        ClassificationHead(4, "attend")
