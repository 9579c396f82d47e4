import copy

import pytest
import torch
from formulas import (
    DEEP,
    LENGTHS,
    B,
    H,
    I,
    T,
    assert_near,
    every_kind,
    every_lasting,
    made,
    options_of,
    oracle,
)
from modules import (
    input_of,
    named,
    ours_of,
    run,
    states_of,
    theirs_of,
    tuple_of,
    with_gradients,
)
from parity import assert_same_bits
from torch.nn.utils.rnn import pack_padded_sequence

from pymtl import LSTM
from pymtl.recurrent.options import Options

# Numbers in evaluation.

LAYOUTS = {
    "time first": ({}, B, None),
    "batch first": ({"batch_first": True}, B, None),
    "unbatched": ({}, None, None),
    "unbatched, batch first": ({"batch_first": True}, None, None),
    "lengths": ({}, B, "lengths"),
    "lengths, batch first": ({"batch_first": True}, B, "lengths"),
    "packed": ({}, B, "packed"),
    "packed and sorted": ({}, B, "sorted"),
}


@pytest.mark.parametrize("given", [False, True], ids=["no states", "states"])
@pytest.mark.parametrize("layout", LAYOUTS)
@every_kind
def test_results_and_gradients_are_the_formulas_in_every_layout(kind, layout, given):
    options, batch, how = LAYOUTS[layout]
    module = made(kind, "both", dtype=torch.float64, **DEEP, **options)
    x, hx = input_of(module, batch, T), states_of(module, batch) if given else None
    lengths = {"lengths": LENGTHS} if how == "lengths" else {}
    if how in ("packed", "sorted"):
        x = pack_padded_sequence(x, LENGTHS if how == "packed" else [6, 3, 1], enforce_sorted=how == "sorted")
    actual = with_gradients(module, x, hx, call=lambda module, *args: module(*args, **lengths))
    assert_near(actual, with_gradients(module, x, hx, call=lambda *args: oracle(*args, **lengths)))


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"bidirectional": True}, {"num_layers": 3}, {**DEEP, "bias": False}], ids=str
)
@every_lasting
@every_kind
def test_results_and_gradients_are_the_formulas_at_every_shape(kind, variant, options):
    module = made(kind, variant, dtype=torch.float64, **options)
    x, hx = input_of(module, B, 4), states_of(module)
    expected = with_gradients(module, x, hx, call=oracle)
    assert_near(with_gradients(module, x, hx), expected)
    assert_near(run(module, x, hx), {name: expected[name] for name in run(module, x, hx)})


@pytest.mark.parametrize("sizes", [(1, 1), (3, 2), (9, 33), (17, 40)], ids=str)
@every_kind
def test_any_sizes_on_any_instruction_set(kind, sizes, isa):
    module = made(kind, "both", *sizes, dtype=torch.float64, bidirectional=True)
    x = input_of(module, 2, 3)
    assert_near(with_gradients(module, x), with_gradients(module, x, call=oracle))


@pytest.mark.parametrize("offset", [0, 1000])
@every_kind
def test_float32_is_on_average_as_near_as_plain_float32(kind, offset):
    # Normalising makes large errors of small ones where a variance is small, on either side and by luck.
    ratios = {}
    for _ in range(8):
        module = made(kind, "both", 9, 33, **DEEP)
        with torch.no_grad():
            module.weight_ih_l0.mul_(10)
            module.weight_hh_l0.mul_(10)
        x = input_of(module, 2, 4) + offset
        actual, plain = with_gradients(module, x), with_gradients(module, x, call=oracle)
        truth = with_gradients(copy.deepcopy(module).double(), x.double(), call=oracle)
        for name, value in truth.items():
            floor = torch.finfo(torch.float32).eps * value.abs().max()
            error, allowed = ((r[name].double() - value).abs().max() + floor for r in (actual, plain))
            ratios.setdefault(name.partition("_l")[0], []).append((error / allowed).log())
    for name, logs in ratios.items():
        assert torch.stack(logs).mean().exp() < 2, name


@pytest.mark.parametrize("zoneout", [(0.4, 0), (0, 0.4), (1, 0), (0, 1), (1, 1)], ids=str)
def test_zoneout_of_h_and_of_c_apart(zoneout):
    module = LSTM(I, H, dtype=torch.float64, zoneout=zoneout).eval()
    x, hx = input_of(module), states_of(module)
    assert_near(with_gradients(module, x, hx), with_gradients(module, x, hx, call=oracle))


@every_lasting
@every_kind
def test_a_second_derivative_is_the_formulas(kind, variant):
    module = made(kind, variant, dtype=torch.float64)
    x = input_of(module, 2, 3)

    def penalty(call):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(call(leaf)[0].square().sum(), leaf, create_graph=True)
        parameters = dict(module.named_parameters())
        found = torch.autograd.grad(first.square().sum(), list(parameters.values()), materialize_grads=True)
        return {"first": first.detach(), **dict(zip(parameters, found))}

    assert_near(penalty(module), penalty(lambda leaf: oracle(module, leaf)))


# Precisions.


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
@every_kind
def test_lower_precision_runs_both_ways_and_is_near(kind, how, training):
    module = made(kind, "both" if not training else "all", **DEEP).train(training)
    x = input_of(module, B, T)
    expected = run(module, x, lengths=LENGTHS)
    dtype = torch.float16 if how == "float16" else torch.bfloat16
    if how != "autocast":
        module, x = module.to(dtype), x.to(dtype)
    for lengths in (None, LENGTHS):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            actual = named(*module(x, lengths=lengths))
            output, *_ = module(pack_padded_sequence(x, LENGTHS, enforce_sorted=False))
        assert {r.dtype for r in actual.values()} == {dtype}
        assert output.data.dtype == dtype
        gradients = torch.autograd.grad(sum(r.float().sum() for r in actual.values()), list(module.parameters()))
        assert all(g.isfinite().all() for g in gradients)
        assert all(g.any() for g in gradients if kind != "RNN relu")
    if not training:
        assert_near({n: r.detach() for n, r in actual.items()}, expected, rtol=0.15, atol=0.15)


@every_lasting
@every_kind
def test_double_is_the_formulas_and_the_meta_device_gives_shapes(kind, variant):
    module = made(kind, variant, **DEEP).double()
    x = input_of(module)
    assert_near(run(module, x), run(lambda x: oracle(module, x), x))
    shapes = {name: result.shape for name, result in run(module, x).items()}
    results = named(*module.to("meta")(x.to("meta")))
    assert {name: result.shape for name, result in results.items()} == shapes


# Equal bits.


@pytest.mark.parametrize("hidden_size", [7, 40])
@every_lasting
@every_kind
def test_a_sequence_is_the_same_bits_in_any_batch_at_any_padding_and_number_of_threads(
    kind, variant, hidden_size, threads
):
    module = made(kind, variant, 9, hidden_size, **DEEP)
    lengths = [5, 12, 1, 7, 12, 3, 2]
    x, hx = input_of(module, len(lengths), 12), states_of(module, len(lengths))
    threads(1)
    whole = run(module, x, hx, lengths=lengths)
    threads(2)
    assert_same_bits(run(module, x, hx, lengths=lengths), whole)
    longer = run(module, torch.cat([x, torch.full_like(x, torch.nan)]), hx, lengths=lengths)
    assert_same_bits(longer | {"output": longer["output"][:12]}, whole)
    recorded = named(*module(x, hx, lengths=lengths))
    assert_same_bits(recorded, whole)
    for b, length in enumerate(lengths):
        own = tuple(s[:, b].contiguous() for s in tuple_of(hx))
        alone = run(module, x[:length, b], own if kind == "LSTM" else own[0])
        expected = {name: r[:, b] for name, r in whole.items()} | {"output": whole["output"][:length, b]}
        assert_same_bits(alone, expected)


@every_lasting
@every_kind
def test_chunks_with_carried_state_are_the_same_bits(kind, variant):
    module = made(kind, variant, 9, 20, num_layers=2)
    x = input_of(module, B, 11)
    expected = run(module, x)
    with torch.no_grad():
        state, outputs = None, []
        for chunk in x.split([1, 4, 2, 1, 3]):
            output, state = module(chunk, state)
            outputs.append(output)
    assert_same_bits(named(torch.cat(outputs), state), expected)


@pytest.mark.parametrize("variant", ["recurrent dropout", "weight drop"])
@every_kind
def test_what_acts_in_training_alone_leaves_evaluation_as_it_was(kind, variant):
    module, plain = ours_of(kind, I, H, **options_of(kind, variant), **DEEP).eval(), ours_of(kind, I, H, **DEEP).eval()
    plain.load_state_dict(module.state_dict())
    x, hx = input_of(module), states_of(module)
    assert_same_bits(with_gradients(module, x, hx), with_gradients(plain, x, hx))
    assert_same_bits(run(module, x, lengths=LENGTHS), run(plain, x, lengths=LENGTHS))
    assert not torch.equal(run(module.train(), x)["output"], run(plain, x)["output"])


@every_kind
def test_all_off_is_the_plain_module(kind):
    off = {
        "recurrent_dropout": 0,
        "weight_drop": 0.0,
        "zoneout": (0, 0.0) if kind == "LSTM" else 0,
        "layer_norm": False,
    }
    modules, after = [], []
    for make, options in ((ours_of, off), (ours_of, {}), (theirs_of, {})):
        torch.manual_seed(3)
        modules.append(make(kind, I, H, dropout=0.5, **DEEP, **options))
        after.append(torch.rand(4))
    module, plain, theirs = modules
    assert torch.equal(after[0], after[2])
    assert_same_bits(module.state_dict(), theirs.state_dict())
    assert list(module.state_dict()) == list(theirs.state_dict())
    assert repr(module) == repr(plain) == repr(theirs)
    assert module._pymtl_variants == Options()
    x = input_of(module)
    results = []
    for each in modules:
        torch.manual_seed(4)
        results.append(run(each, x) | {"next": torch.rand(4)})
    assert_same_bits(results[0], results[1])
    assert_near(results[0], results[2], rtol=1e-4, atol=1e-5)
