import itertools

import pytest
import torch
from parity import assert_same_bits
from samples import (
    ALL_OPTIONS,
    RAGGED,
    RESULTS,
    SMALL,
    B,
    F,
    RNNCase,
    function_of,
    heads_arguments,
    named,
    random_like,
    raw_arguments,
    rnn_sample,
    rnn_weights,
    run_ours,
    run_reference,
    with_gradients,
)
from torch.autograd import gradcheck, gradgradcheck

from pymtl import ops

TINY = [
    RNNCase(2, 3, steps=3, batch=2, reverse=(F,)),
    RNNCase(2, 2, steps=2, batch=2, h0=True, c0=True),
    RNNCase(2, 2, lengths=(3, 1), bias=False, h0=True),
    RNNCase(2, 3, lengths=(3, 2, 1), c0=True),
    RNNCase(1, 2, lengths=(2, 2), reverse=(F, B, F, B), h0=True, c0=True),
    RNNCase(2, 2, lengths=(2, 1), reverse=(F, B, F, B), inputs=2),
    RNNCase(2, 2, steps=3, batch=2, h0=True, mode="GRU"),
    RNNCase(2, 3, lengths=(3, 1), bias=False, mode="GRU"),
    RNNCase(1, 2, lengths=(3, 2, 1), reverse=(F, B, F, B), h0=True, mode="GRU"),
    RNNCase(2, 2, lengths=(3, 1), h0=True, mode="RNN_TANH"),
    RNNCase(2, 2, steps=2, batch=2, bias=False, mode="RNN_RELU"),
]
SUBSETS = [
    ["input"],
    ["h0"],
    ["c0"],
    ["weight_ih[1]"],
    ["weight_hh[0]", "c0"],
    ["bias_hh[0]"],
    ["bias_ih[1]", "input"],
]


@pytest.mark.parametrize("case", TINY, ids=str)
def test_gradcheck(case):
    sample = rnn_sample(case, torch.float64)
    assert gradcheck(*function_of(sample, list(sample.tensors())))


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_gradcheck_where_only_some_inputs_require_a_gradient(names):
    sample = rnn_sample(RNNCase(2, 3, lengths=(3, 1), h0=True, c0=True), torch.float64)
    assert gradcheck(*function_of(sample, names))


@pytest.mark.parametrize("case", TINY, ids=str)
def test_gradgradcheck(case):
    sample = rnn_sample(case, torch.float64)
    assert gradgradcheck(*function_of(sample, list(sample.tensors())), fast_mode=True)


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_gradgradcheck_where_only_some_inputs_require_a_gradient(names):
    sample = rnn_sample(RNNCase(2, 2, lengths=(2, 1), h0=True, c0=True), torch.float64)
    assert gradgradcheck(*function_of(sample, names))


@pytest.mark.parametrize("result", range(3), ids=RESULTS)
def test_gradgradcheck_through_one_result_alone(result):
    sample = rnn_sample(RNNCase(2, 2, lengths=(2, 1), h0=True, c0=True), torch.float64)
    run, tensors = function_of(sample, list(sample.tensors()))
    assert gradgradcheck(lambda *t: run(*t)[result], tensors, fast_mode=True)


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_a_gradient_has_the_same_bits_whatever_else_requires_one(names, dtype):
    sample = rnn_sample(RNNCase(7, 20, lengths=(6, 4, 1), h0=True, c0=True), dtype)
    seeds = random_like(run_ours(sample))
    everything = with_gradients(run_ours, sample, seeds)
    some = with_gradients(run_ours, sample, seeds, names)
    assert_same_bits(some, {name: everything[name] for name in some})


def run_raw(sample):
    results = torch.ops.pymtl.rnn_training(*raw_arguments(sample))[:3]
    return named(sample, results)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_raw_training_op_gives_the_same_bits(case, dtype):
    sample = rnn_sample(case, dtype)
    seeds = random_like(run_ours(sample))
    for names in (None, ["input"], ["weight_hh[0]"]):
        assert_same_bits(with_gradients(run_raw, sample, seeds, names), with_gradients(run_ours, sample, seeds, names))


def test_an_input_that_needs_no_gradient_gets_none():
    sample = rnn_sample(ALL_OPTIONS).leaves(["weight_hh[2]"])
    run_ours(sample)["output"].sum().backward()
    gradients = {name for name, tensor in sample.tensors().items() if tensor.grad is not None}
    assert gradients == {"weight_hh[2]"}


def test_one_tensor_used_as_several_weights_gathers_all_gradients():
    weights = rnn_weights(3, 4, (F, F), dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    tied = weights.weight_ih[0].clone().requires_grad_()
    apart = [tied.detach().clone().requires_grad_() for _ in range(2)]
    ops.rnn(x, None, weights._replace(weight_ih=[tied, tied]))[0].sum().backward()
    ops.rnn(x, None, weights._replace(weight_ih=apart))[0].sum().backward()
    assert torch.equal(tied.grad, apart[0].grad + apart[1].grad)


@pytest.mark.parametrize("changed", ["input", "weight_ih[0]", "weight_hh[1]", "h0", "output"])
def test_backward_refuses_after_a_saved_tensor_was_changed_in_place(changed):
    sample = rnn_sample(ALL_OPTIONS).leaves()
    results = run_ours(sample)
    tensors = sample.tensors() | results
    with torch.no_grad():
        tensors[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(results["h_n"].sum(), sample.input)


@pytest.mark.parametrize("names", [["input"], ["weight_ih[0]"], ["bias_hh[1]"], ["h0"]], ids="+".join)
def test_backward_through_the_raw_inference_ops_raises(names):
    sample = rnn_sample(ALL_OPTIONS).leaves(names)
    heads = (torch.randn(3, 4 * 33), torch.randn(3), True, True)
    results = [
        *torch.ops.pymtl.rnn_inference(*raw_arguments(sample), None),
        *torch.ops.pymtl.rnn_heads(*heads_arguments(sample), None, *heads),
    ]
    for result in results:
        with pytest.raises(RuntimeError, match="no derivative"):
            result.sum().backward()


@pytest.mark.parametrize("name", ["head_weight", "head_bias"])
def test_backward_through_the_raw_rnn_heads_to_its_heads_raises(name):
    sample = rnn_sample(RAGGED)
    head = {"head_weight": torch.randn(3, 38), "head_bias": torch.randn(3)}
    head[name].requires_grad_()
    logits = torch.ops.pymtl.rnn_heads(*heads_arguments(sample), None, *head.values(), False, False)[0]
    with pytest.raises(RuntimeError, match="no derivative"):
        logits.sum().backward()


def test_backward_through_the_raw_rnn_pack_raises():
    weights = rnn_weights(3, 4)
    weights.weight_ih[0].requires_grad_()
    prepacked = torch.ops.pymtl.rnn_prepack(*weights, None)
    if prepacked.requires_grad:
        with pytest.raises(RuntimeError):
            prepacked.sum().backward()


def test_forward_mode_derivatives():
    sample = rnn_sample(RNNCase(3, 4), torch.float64)
    tangent = torch.randn_like(sample.input)
    _, expected = torch.func.jvp(
        lambda x: run_reference(sample.map(lambda name, t: x if name == "input" else t))["output"],
        (sample.input,),
        (tangent,),
    )
    _, actual = torch.func.jvp(lambda x: ops.rnn(x, None, sample.weights)[0], (sample.input,), (tangent,))
    torch.testing.assert_close(actual, expected)
    with pytest.raises(NotImplementedError, match="for inference"):
        torch.func.jvp(lambda x: ops.rnn_heads(x, None, sample.weights, None, None).h_n, (sample.input,), (tangent,))


@pytest.mark.parametrize("name", ["input", "weight_ih[1]", "weight_hh[0]", "bias_ih[0]", "h0", "c0"])
def test_forward_mode_derivatives_outside_of_transforms(name):
    sample = rnn_sample(RNNCase(3, 4, lengths=(3, 1), h0=True, c0=True), torch.float64)
    tangent = torch.randn_like(sample.tensors()[name])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(sample.tensors()[name], tangent)
        results = run_ours(sample.map(lambda other, tensor: dual if other == name else tensor))
        actual = {key: torch.autograd.forward_ad.unpack_dual(result).tangent for key, result in results.items()}
        with pytest.raises(NotImplementedError, match="for inference"):
            ops.rnn_heads(
                dual if name == "input" else sample.input,
                sample.batch_sizes,
                sample.map(lambda other, tensor: dual if other == name else tensor).weights,
                None,
                None,
                h0=dual if name == "h0" else sample.h0,
                c0=dual if name == "c0" else sample.c0,
            )

    def loss(tensor):
        results = run_ours(sample.map(lambda other, given: tensor if other == name else given))
        return tuple(results.values())

    _, expected = torch.func.jvp(loss, (sample.tensors()[name],), (tangent,))
    for (key, value), other in zip(actual.items(), expected):
        torch.testing.assert_close(value, other, msg=key)
    assert actual["output"].any()


@pytest.mark.parametrize("transform", ["grad", "vjp", "vmap"])
def test_functional_transforms(transform):
    sample = rnn_sample(RNNCase(3, 4), torch.float64)

    def loss(run, x):
        return run(sample.map(lambda name, t: x if name == "input" else t))["output"].square().sum()

    def apply(run):
        if transform == "grad":
            return torch.func.grad(lambda x: loss(run, x))(sample.input)
        if transform == "vjp":
            return torch.func.vjp(lambda x: loss(run, x), sample.input)[1](sample.input.new_ones(()))[0]
        return torch.func.vmap(lambda x: loss(run, x))(torch.stack([sample.input, 2 * sample.input]))

    torch.testing.assert_close(apply(run_ours), apply(run_reference))


@pytest.mark.parametrize("raw", [False, True], ids=["wrapper", "raw op"])
@pytest.mark.parametrize("layer_norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH"])
def test_gradients_share_no_memory(mode, layer_norm, raw):
    sample = rnn_sample(RNNCase(3, 5, mode=mode, layer_norm=layer_norm)).leaves()
    results = (run_raw if raw else run_ours)(sample)
    found = torch.autograd.grad(results["output"].sum(), list(sample.tensors().values()), allow_unused=True)
    gradients = [gradient for gradient in found if gradient is not None]
    places = sorted((g.data_ptr(), g.data_ptr() + g.nbytes) for g in gradients)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))
