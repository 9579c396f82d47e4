"""PyTorch's own samples of nn.LSTM, nn.GRU and nn.RNN, given to our modules in their place."""

import copy
import pickle
from functools import partial

import pytest
import torch
from modules import data_of, in_double, like, named, run, tuple_of, with_data, with_gradients
from parity import assert_parity, assert_same_bits
from samples import spread, transposed
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import pymtl

CLASSES = {nn.LSTM: pymtl.LSTM, nn.GRU: pymtl.GRU, nn.RNN: pymtl.RNN}
every_class = pytest.mark.parametrize("theirs", CLASSES, ids=lambda cls: cls.__name__)
train_and_eval = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.fixture(scope="module")
def database():
    module = pytest.importorskip("torch.testing._internal.common_modules")
    torch.backends.__allow_nonbracketed_mutation_flag = True  # its import forbids to set flags such as mkldnn's
    return {info.module_cls: info for info in module.module_db}


@pytest.fixture
def samples(database, theirs, training):
    """A function that yields pairs of modules of the same weights, and the arguments of a call."""

    def generate(dtype, references=False):
        inputs = database[theirs].module_inputs_func(
            database[theirs],
            device="cpu",
            dtype=dtype,
            requires_grad=False,
            training=training,
            with_packed_sequence=True,
        )
        assert len(inputs) >= 32
        for sample in inputs:
            args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
            expected = theirs(*args, **kwargs, dtype=dtype).train(training)
            ours = CLASSES[theirs](*args, **kwargs, dtype=dtype).train(training)
            ours.load_state_dict(expected.state_dict())
            assert not sample.forward_input.kwargs
            reference = [sample.reference_fn] if references else []
            yield ours, expected, sample.forward_input.args, *reference

    return generate


def has_kernels(module):
    return module.proj_size == 0


def assert_same_numbers(module, found, expected):
    """The same bits; on torch's own path the same up to rounding: MKL's bits may depend on where memory begins."""
    if has_kernels(module):
        return assert_same_bits(found, expected)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=rounding(expected[name]))


def rounding(values):
    return 4 * torch.finfo(values.dtype).eps * values.abs().max().item()


@train_and_eval
@every_class
def test_results_and_gradients_are_as_accurate_as_torchs(samples):
    pools = [], [], []
    for ours, theirs, args in samples(torch.float32):
        found, expected = with_gradients(ours, *args), with_gradients(theirs, *args)
        if has_kernels(ours):
            truth = with_gradients(in_double(theirs), *args, dtype=torch.float64)
            assert shapes_of(found) == shapes_of(expected) == shapes_of(truth)
            for pool, results in zip(pools, (found, expected, truth)):
                pool.append(results)
            without = run(ours, *args)
            assert_same_bits(without, {name: found[name] for name in without})
        else:
            assert_same_bits(found, expected)
    # Single samples hold as few as six numbers, where torch's own error may be next to nothing by chance.
    assert_parity(*map(joined, pools))


def shapes_of(results):
    return {name: result.shape for name, result in results.items()}


def joined(pool):
    names = dict.fromkeys(name for results in pool for name in results)
    return {name: torch.cat([results[name].flatten() for results in pool if name in results]) for name in names}


@train_and_eval
@every_class
def test_an_unbatched_sequence_gives_the_bits_of_the_databases_reference(samples):
    for ours, _, args, reference in samples(torch.float32, references=True):
        if isinstance(args[0], torch.Tensor):
            with torch.no_grad():
                expected = reference(ours, *args)
            assert_same_bits(run(ours, *args), named(*expected))


def positional(module, args, names=()):
    """A function of the input, the states and the parameters ``names`` alone, and its arguments."""
    input, *rest = args
    hx = rest[0] if rest else None
    states = [] if hx is None else list(tuple_of(hx))
    weights = {name: p.detach() for name, p in module.named_parameters()}

    def call(data, *others):
        given = [] if hx is None else [like(hx, others[: len(states)])]
        new = weights | dict(zip(names, others[len(states) :], strict=True))
        results = torch.func.functional_call(module, new, (with_data(input, data), *given))
        return tuple(named(*results).values())

    tensors = [data_of(input), *states, *(weights[name] for name in names)]
    return call, [t.detach().clone().requires_grad_() for t in tensors]


@train_and_eval
@every_class
def test_derivatives_are_those_of_finite_differences(samples):
    for ours, _, args in samples(torch.float64):
        if has_kernels(ours):
            names = [name for name, _ in ours.named_parameters()]
            call, tensors = positional(ours, args, names)
            gradcheck(call, tensors, fast_mode=True)


@train_and_eval
@every_class
def test_second_derivatives_are_those_of_finite_differences(samples):
    for ours, _, args in samples(torch.float64):
        if has_kernels(ours) and ours.bias == ours.training and not ours.batch_first:
            names = [name for name, _ in ours.named_parameters()]
            call, tensors = positional(ours, args, names)
            gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("training", [True], ids=["train"])
@every_class
def test_second_derivatives_of_input_and_states_are_right_number_by_number(samples):
    seen = set()
    for ours, _, args in samples(torch.float64):
        key = ours.mode, ours.bidirectional, len(args)
        if has_kernels(ours) and key not in seen and isinstance(args[0], torch.Tensor):
            seen.add(key)
            gradgradcheck(*positional(ours, args))
    assert len(seen) in (4, 8)


@both_dtypes
@train_and_eval
@every_class
def test_non_contiguous_input_and_states_give_the_same_bits(samples, dtype):
    for ours, _, (input, *rest) in samples(dtype):
        expected = with_gradients(ours, input, *rest)
        for change in (spread, transposed):
            x = with_data(input, change(data_of(input)).requires_grad_())
            hx = [like(rest[0], [change(s).requires_grad_() for s in tuple_of(rest[0])])] if rest else []
            assert not data_of(x).is_contiguous()
            results = named(*ours(x, *hx))
            assert_same_numbers(ours, results, {name: expected[name] for name in results})


@both_dtypes
@train_and_eval
@every_class
def test_copies_and_pickles_give_the_same_bits(samples, dtype):
    for ours, _, args in samples(dtype):
        expected = with_gradients(ours, *args)
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert type(twin) is type(ours)
            assert twin.training == ours.training
            assert repr(twin) == repr(ours)
            assert_same_numbers(ours, with_gradients(twin, *args), expected)


@both_dtypes
@train_and_eval
@every_class
def test_converted_reverted_and_frozen_modules_give_the_same_bits(samples, dtype):
    for ours, theirs, args in samples(dtype):
        expected, of_theirs = with_gradients(ours, *args), with_gradients(theirs, *args)
        fast = pymtl.convert(theirs)
        assert type(fast) is type(ours)
        assert_same_numbers(ours, with_gradients(fast, *args), expected)
        assert_same_numbers(ours, with_gradients(pymtl.revert(fast), *args), of_theirs)
        if not ours.training:
            assert_same_numbers(ours, run(pymtl.freeze(ours), *args), {n: expected[n] for n in run(ours, *args)})


@train_and_eval
@every_class
def test_one_gradient_alone_is_the_one_among_all(samples):
    for ours, _, args in samples(torch.float32):
        expected = with_gradients(ours, *args)
        names = [name for name, _ in ours.named_parameters()]
        for wanted in names[:: max(1, len(names) // 4)]:
            for name, parameter in ours.named_parameters():
                parameter.requires_grad_(name == wanted)
            found = with_gradients(ours, *args, only=[wanted])
            assert_same_numbers(ours, found, {name: expected[name] for name in found})


@pytest.mark.parametrize("training", [False], ids=["eval"])
@every_class
def test_factory_arguments_place_and_type_the_parameters(database, theirs, training):
    inputs = database[theirs].module_inputs_func(
        database[theirs], device="cpu", dtype=torch.float32, requires_grad=False, training=training
    )
    for sample in inputs:
        make = partial(CLASSES[theirs], *sample.constructor_input.args, **sample.constructor_input.kwargs)
        for dtype in (torch.float32, torch.float64, torch.half, torch.bfloat16):
            for device in ("cpu", "meta", torch.device("cpu")):
                module = make(device=device, dtype=dtype)
                assert {p.dtype for p in module.parameters()} == {dtype}
                assert {p.device for p in module.parameters()} == {torch.device(device)}
                twin = theirs(*sample.constructor_input.args, **sample.constructor_input.kwargs, dtype=dtype)
                assert {n: p.shape for n, p in module.named_parameters()} == {
                    n: p.shape for n, p in twin.named_parameters()
                }
        with torch.device("meta"):
            assert all(p.is_meta for p in make().parameters())


@both_dtypes
@every_class
def test_the_databases_errors_are_raised_in_torchs_words(database, theirs, dtype):
    info = database[theirs]
    errors = info.module_error_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=False)
    assert len(errors) >= (14 if torch.__version__ >= "2.13" else 2)  # torch 2.10 knows two
    for error in errors:
        construction, call = error.module_error_input.constructor_input, error.module_error_input.forward_input

        def construct_and_call(construction=construction, call=call):
            module = CLASSES[theirs](*construction.args, **construction.kwargs)
            module(*call.args, **call.kwargs)

        with pytest.raises(error.error_type, match=error.error_regex):
            construct_and_call()


@train_and_eval
@every_class
def test_a_state_dict_fills_a_module_made_without_numbers(samples):
    for ours, theirs, args in samples(torch.float32):
        empty = copy.deepcopy(ours).to("meta").to_empty(device="cpu")
        for parameter in empty.parameters():
            parameter.data.fill_(torch.nan)
        empty.load_state_dict(theirs.state_dict())
        assert_same_numbers(ours, run(empty, *args), run(ours, *args))
