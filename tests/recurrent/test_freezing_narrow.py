"""Modules frozen in fewer bits than their parameters have: whose numbers they give, and all that freezing promises."""

import copy
import pickle

import pytest
import torch
from modules import KINDS, WEIGHT_CHANGES, input_of, named, ours_of, run, states_if, tuple_of, with_gradients
from parity import assert_same_bits
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import pymtl
from pymtl import reference

NARROW = [torch.int8, torch.bfloat16]
LENGTHS = torch.tensor([4, 6, 1])


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch.compiler.reset()


def frozen(kind="LSTM", dtype=torch.int8, **options):
    options = {"bidirectional": True, "num_layers": 2, **options}
    return pymtl.freeze(ours_of(kind, 5, 20, **options).eval(), dtype)


def dequantised(module):
    """A module of the weights that the integers stand for."""
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for weight in twin.parameters():
            if weight.dim() == 2:
                weight.copy_(reference.int8_weight(weight).dequantised())
    return twin


def rounded(module):
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for weight in twin.parameters():
            if weight.dim() == 2:
                weight.copy_(weight.bfloat16().float())
    return twin


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["no states", "states"])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_the_module_of_rounded_weights(kind, given, batch_first):
    module = frozen(kind, torch.bfloat16, batch_first=batch_first)
    x, hx = input_of(module), states_if(given, module)
    assert_same_bits(run(module, x, hx), run(rounded(module), x, hx))
    assert_same_bits(run(module, x, hx, lengths=LENGTHS), run(rounded(module), x, hx, lengths=LENGTHS))


@pytest.mark.parametrize("kind", KINDS)
def test_int8_is_near_the_module_and_nearer_to_its_own_integers(kind):
    torch.manual_seed(2)
    module = frozen(kind)
    x = input_of(module, batch=8, steps=20)
    ours = run(module, x)["output"]
    plain, integers = (run(twin, x)["output"] for twin in (copy.deepcopy(module), dequantised(module)))
    assert 1e-4 < (ours - plain).abs().max() < 0.05
    assert (ours - integers).abs().mean() < (ours - plain).abs().mean()


LAYOUTS = {
    "lengths": lambda m, x, hx: named(*m(x, hx, lengths=LENGTHS)),
    "packed": lambda m, x, hx: in_padded(m, x, *m(pack_padded_sequence(x, LENGTHS, enforce_sorted=False), hx)),
    "each alone": lambda m, x, hx: each_alone(m, x, hx),
    "compiled": lambda m, x, hx: named(*torch.compile(m, backend="aot_eager", fullgraph=True)(x, hx, lengths=LENGTHS)),
}


def in_padded(module, x, packed, state):
    return named(nn.utils.rnn.pad_packed_sequence(packed, total_length=x.shape[0])[0], state)


def each_alone(module, x, hx):
    outputs, states = torch.zeros(*x.shape[:2], 40), []
    for row, length in enumerate(LENGTHS):
        own = None if hx is None else tuple(s[:, row : row + 1] for s in tuple_of(hx))
        own = own[0] if own is not None and module.mode != "LSTM" else own
        output, state = module(x[:length, row : row + 1], own)
        outputs[:length, row] = output[:, 0]
        states.append(tuple_of(state))
    joined = tuple(torch.cat(parts, 1) for parts in zip(*states))
    return named(outputs, joined if module.mode == "LSTM" else joined[0])


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["no states", "states"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_gives_the_same_bits(kind, given, dtype):
    module = frozen(kind, dtype)
    x, hx = input_of(module), states_if(given, module)
    with torch.no_grad():
        expected = LAYOUTS["lengths"](module, x, hx)
        for name in LAYOUTS:
            assert_same_bits(LAYOUTS[name](module, x, hx), expected)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_in_chunks_gives_the_bits_of_the_whole(kind, dtype):
    module = frozen(kind, dtype, bidirectional=False)
    x, hx = input_of(module, steps=11), None
    whole = run(module, x)["output"]
    chunks = []
    with torch.no_grad():
        for chunk in x.split([1, 1, 5, 4]):
            output, hx = module(chunk, hx)
            chunks.append(output)
    assert torch.equal(torch.cat(chunks), whole)


@pytest.mark.parametrize("options", [{"zoneout": 0.2}, {"layer_norm": True}, {"reverse": True, "bidirectional": False}])
def test_options_act_as_they_do_on_rounded_weights(options):
    torch.manual_seed(3)
    module = frozen("LSTM", torch.bfloat16, **options)
    x = input_of(module)
    twin = rounded(module)
    if "layer_norm" in options:  # whose projection of the input stays float32
        with torch.no_grad():
            for name, weight in module.named_parameters():
                if name.startswith("weight_ih"):
                    twin.get_parameter(name).copy_(weight)
    assert_same_bits(run(module, x), run(twin, x))
    integers = run(pymtl.freeze(module, torch.int8), x)
    assert 0 < (integers["output"] - run(copy.deepcopy(module), x)["output"]).abs().max() < 0.05


def test_resets_cut_sequences():
    module = frozen()
    x, resets = input_of(module), torch.zeros(6, 3, dtype=torch.bool)
    resets[2, 1] = True
    output = run(module, x, resets=resets)["output"]
    assert torch.equal(output[2:, 1], run(module, x[2:, 1:2])["output"][:, 0])


# What drops or passes by a snapshot.


@pytest.mark.parametrize("change", [c for n, c in WEIGHT_CHANGES.items() if n != "edit_through_data"])
def test_changed_weights_are_not_answered_with_old_integers(change):
    module = frozen(num_layers=1)
    x = input_of(module)
    call = change(module)
    x = x.to(next(module.parameters()).dtype)
    result = run(call, x)
    pymtl.unfreeze(module)
    assert_same_bits(result, run(call, x))


def test_calls_with_gradients_use_the_parameters():
    module = frozen()
    x = input_of(module)
    assert_same_bits(with_gradients(module, x), with_gradients(copy.deepcopy(module), x))
    assert not torch.equal(run(module, x)["output"], run(copy.deepcopy(module), x)["output"])


@pytest.mark.parametrize("options", [{}, {"zoneout": 0.1}], ids=str)
def test_a_gradient_of_one_layer_makes_all_use_their_parameters(options):
    module = frozen(**options)
    module.requires_grad_(False)
    module.weight_hh_l1.requires_grad_()
    x, head = input_of(module), torch.randn(3, 40)
    plain = copy.deepcopy(module)
    assert torch.equal(module(x)[0], plain(x)[0])
    fused, expected = (m.forward_heads(x, None, head, None) for m in (module, plain))
    assert torch.equal(fused.logits, expected.logits)


def test_transforms_of_torch_func_use_the_parameters():
    module = frozen(bidirectional=False)
    x = input_of(module)
    with torch.no_grad():
        mapped = torch.vmap(lambda row: module(row)[0], in_dims=1, out_dims=1)(x)
        torch.testing.assert_close(mapped, copy.deepcopy(module)(x)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("drop", [lambda m: m.train().eval(), lambda m: m.float(), pymtl.unfreeze])
def test_what_drops_a_snapshot(drop):
    module = frozen()
    plain = run(copy.deepcopy(module), input_of(module) * 0 + 1)
    assert_same_bits(run(drop(module), input_of(module) * 0 + 1), plain)
    assert pymtl.frozen_bytes(module) == 0


def test_copies_and_pickles_have_the_parameters_only():
    module = frozen()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert pymtl.frozen_bytes(twin) == 0
    before = {n: p.clone() for n, p in module.state_dict().items()}
    run(module, input_of(module))
    assert all(torch.equal(p, before[n]) for n, p in module.state_dict().items())


def test_autocast_passes_by_the_snapshot():
    module = frozen()
    x = input_of(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(run(module, x), run(copy.deepcopy(module), x))


# Compiled code, which runs the integers too, and says so when they are not those of the parameters any more.


def test_compiled_code_refuses_changed_parameters():
    module = frozen(num_layers=1)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = input_of(module)
    assert_same_bits(run(compiled, x), run(module, x))
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
        with pytest.raises(RuntimeError, match=r"parameters: expected them as they were .* call pymtl\.freeze again"):
            compiled(x)
        pymtl.freeze(module, torch.int8)
        assert_same_bits(run(compiled, x), run(module, x))
        pymtl.unfreeze(module)
        assert_same_bits(run(compiled, x), run(module, x))


def test_many_layers_and_new_snapshots_are_compiled_once():
    layers = [frozen(bidirectional=False, num_layers=1) for _ in range(10)]
    x = input_of(layers[0])
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for module in layers:
        compiled = torch.compile(module, backend=counter, fullgraph=True)
        assert_same_bits(run(compiled, x), run(module, x))
    for _ in range(10):
        with torch.no_grad():
            module.weight_hh_l0.mul_(0.9)
        pymtl.freeze(module, torch.int8)
        assert_same_bits(run(compiled, x), run(module, x))
    assert counter.frame_count <= 2


def test_a_trace_would_record_the_parameters_and_is_refused():
    module = frozen()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"cannot record weights frozen in torch\.int8: call pymtl"):
        torch.jit.trace(module, (input_of(module),))


def test_programs_of_export_refuse_weights_of_one_machine():
    module = frozen()
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), pytest.raises(RuntimeError, match=r"torch\.export cannot keep weights"):
            torch.export.export(module, (input_of(module),), strict=False)
    plain = pymtl.freeze(module)
    with torch.no_grad():
        program = torch.export.export(plain, (input_of(module),), strict=False).module()
    x = input_of(module)
    assert torch.equal(program(x)[0], run(plain, x)["output"])


def test_compiled_code_refuses_options_that_its_integers_do_not_know():
    module = frozen(zoneout=0.1)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), pytest.raises(Exception, match=r"compiled code cannot take weights frozen in torch\.int8"):
        compiled(input_of(module))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_programs_hold_weights_in_the_order_of_no_machine(kind, dtype):
    module = frozen(kind, dtype)
    x, hx = input_of(module), states_if(True, module)
    expected = run(module, x, hx)
    portable = copy.deepcopy(module)
    portable._pymtl_make_portable(dtype)
    assert_same_bits(run(portable, x, hx), expected)
    dims = {0: torch.export.Dim("steps"), 1: torch.export.Dim("batch")}
    with torch.no_grad():
        program = torch.export.export(portable, (x,), dynamic_shapes=(dims,), strict=False)
    assert not [n for n in program.graph.nodes if n.op == "placeholder" and n.users and "p_weight" in n.name]
    for batch in (1, 4):
        x = input_of(module, batch, steps=9)
        assert_same_bits(named(*program.module()(x)), run(module, x))


def test_programs_refuse_layers_whose_weights_they_would_keep_in_float32():
    for options in ({"zoneout": 0.1}, {"layer_norm": True}):
        with pytest.raises(RuntimeError, match="weights: a program keeps float32 for layers with"):
            ours_of("LSTM", 5, 7, **options).eval()._pymtl_make_portable(torch.int8)


# What is refused, and sizes.


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dtype": torch.float64}, "of torch.float64 on cpu"),
        ({"proj_size": 3}, "no kernel projects h"),
        ({"dtype": torch.bfloat16}, "of torch.bfloat16 on cpu"),
        ({"device": "meta"}, "of torch.float32 on meta"),
    ],
    ids=str,
)
def test_layers_that_cannot_are_named_and_nothing_is_frozen(options, match):
    model = nn.ModuleList([pymtl.LSTM(5, 7), pymtl.LSTM(5, 7, **options)]).eval()
    with pytest.raises(
        RuntimeError, match=rf"weights: torch.int8 is for layers of torch.float32 .*LSTM\(5, 7.*{match}"
    ):
        pymtl.freeze(model, torch.int8)
    assert pymtl.frozen_bytes(model) == 0


def test_other_dtypes_and_training_mode_are_refused():
    with pytest.raises(
        ValueError, match=r"weights: expected torch.int8 or torch.bfloat16 or the module's torch.float32"
    ):
        pymtl.freeze(pymtl.LSTM(5, 7).eval(), torch.float16)
    with pytest.raises(RuntimeError, match="in training mode"):
        pymtl.freeze(pymtl.LSTM(5, 7), torch.int8)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_weights_that_are_not_finite_are_named(bad):
    module = pymtl.LSTM(5, 7, num_layers=2).eval()
    with torch.no_grad():
        module.weight_ih_l1[2, 3] = bad
    with pytest.raises(ValueError, match="weight_ih_l1: expected finite numbers to make 8-bit integers of"):
        pymtl.freeze(module, torch.int8)
    assert pymtl.frozen_bytes(pymtl.freeze(module, torch.bfloat16)) > 0  # these may be anything


def test_weights_that_are_computed_anew_are_named():
    module = nn.utils.parametrizations.weight_norm(pymtl.LSTM(5, 7).eval(), "weight_hh_l0")
    with pytest.raises(RuntimeError, match="computes weight_hh_l0 anew at each call: remove its parametrization"):
        pymtl.freeze(module, torch.int8)


def test_what_no_integer_is_made_of_may_be_anything():
    module = pymtl.LSTM(5, 7, layer_norm=True).eval()
    with torch.no_grad():
        module.weight_ih_l0[2, 3] = float("inf")
    assert pymtl.frozen_bytes(pymtl.freeze(module, torch.int8)) > 0


def test_weights_that_bfloat16_would_make_infinite_are_named():
    module = pymtl.LSTM(5, 7).eval()
    with torch.no_grad():
        module.weight_hh_l0[2, 3] = 3.4e38
    with pytest.raises(ValueError, match="weight_hh_l0: expected numbers that bfloat16 holds"):
        pymtl.freeze(module, torch.bfloat16)


def test_too_many_columns_are_named():
    with pytest.raises(ValueError, match="weight_ih_l0: expected at most 65,536 columns of 8-bit integers, got 65,537"):
        pymtl.freeze(pymtl.LSTM(65537, 1).eval(), torch.int8)


def test_a_subclass_may_have_methods_by_plain_names():
    class Own(nn.LSTM):
        def check_narrow(self):
            return "mine"

        def make_portable(self):
            return "mine"

    module = pymtl.freeze(pymtl.convert(Own(5, 7)).eval(), torch.int8)
    assert module.check_narrow() == module.make_portable() == "mine"
    assert pymtl.frozen_bytes(module) > 0


def test_a_snapshot_that_is_not_used_any_more_is_said_to_be():
    module = frozen()
    assert "not used" not in pymtl.describe(module)
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
    assert "not used: the parameters or the instruction set have changed since" in pymtl.describe(module)


def test_a_snapshot_in_int8_is_a_quarter_as_large():
    module = pymtl.LSTM(256, 256, num_layers=2, bidirectional=True).eval()
    plain = pymtl.frozen_bytes(pymtl.freeze(module))
    weights = sum(w.numel() for w in module.parameters() if w.dim() == 2)
    assert weights * 4 < plain < weights * 4.1
    assert weights * 2 < pymtl.frozen_bytes(pymtl.freeze(module, torch.bfloat16)) < weights * 2.1
    assert weights < pymtl.frozen_bytes(pymtl.freeze(module, torch.int8)) < weights * 1.1
    assert pymtl.frozen_bytes(nn.Sequential(module, nn.Linear(2, 2))) == pymtl.frozen_bytes(module)


def test_the_modules_own_dtype_may_be_named():
    module = pymtl.LSTM(5, 7).double().eval()
    x = input_of(module)
    assert_same_bits(run(pymtl.freeze(module, torch.float64), x), run(copy.deepcopy(module), x))
    line = f"frozen in torch.float64 ({pymtl.frozen_bytes(module):,} bytes) for calls without gradients"
    assert line in pymtl.describe(module)
