import pytest
import torch
from formulas import DEEP, LASTING, LENGTHS, B, H, I, T, assert_near, every_kind, every_lasting, made
from modules import input_of, named, ours_of, run, states_of, with_gradients
from parity import assert_same_bits
from torch import nn
from torch.export import Dim
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import pymtl
from pymtl import GRU, LSTM, ClassificationHead, MultiTaskModel, TokenClassificationHead
from pymtl.sharing import ParallelLSTM

EVERY = [*LASTING, "recurrent dropout", "weight drop", "all"]


@pytest.mark.parametrize("variant", EVERY)
@every_kind
def test_an_empty_batch(kind, variant):
    module = made(kind, variant, **DEEP).train()
    assert ours_of(kind, I, H)(torch.randn(T, 0, I))[0].shape == (T, 0, H)
    results = named(*module(torch.randn(T, 0, I)))
    assert results["output"].shape == (T, 0, 2 * H)
    assert results["h_n"].shape == (4, 0, H)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@every_kind
def test_each_gradient_alone_is_the_one_among_all(kind, training):
    module = made(kind, "all", **DEEP).train(training)
    x, hx = input_of(module), states_of(module)
    expected = with_gradients(module, x, hx)
    names = [name for name, _ in module.named_parameters()]
    for only in ([n] for n in ["input", "h0", *(["c0"] if kind == "LSTM" else []), *names]):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in only)
        actual = with_gradients(module, x, hx, only=only)
        assert_same_bits(actual, {name: expected[name] for name in actual})


@pytest.mark.parametrize("variant", EVERY)
@every_kind
def test_a_checkpointed_call_has_the_gradients_of_an_ordinary_one(kind, variant):
    module = made(kind, variant, **DEEP).train()
    x = input_of(module)
    again = with_gradients(module, x, call=lambda module, x, hx: checkpoint(module, x, use_reentrant=False))
    assert_same_bits(again, with_gradients(module, x))


@pytest.mark.parametrize("variant", EVERY)
@every_kind
def test_gradients_are_the_same_bits_on_any_number_of_threads_and_read_no_unset_memory(
    kind, variant, threads, filled_memory
):
    module = made(kind, variant, 9, 40, **DEEP).train()
    x, hx = input_of(module, 7, 12), states_of(module, 7)
    threads(1)
    expected = with_gradients(module, x, hx)
    threads(2)
    assert_same_bits(with_gradients(module, x, hx), expected)
    filled_memory()
    assert_same_bits(with_gradients(module, x, hx), expected)


# Transforms, compilers and programs.


@every_lasting
@every_kind
def test_torch_func_gives_what_autograd_gives(kind, variant):
    module = made(kind, variant, dtype=torch.float64, bidirectional=True)
    parameters, x = dict(module.named_parameters()), input_of(module)

    def loss(parameters, x):
        return functional_call(module, parameters, (x,))[0].square().sum()

    def of(x):
        return dict(zip(parameters, torch.autograd.grad(loss(parameters, x), list(parameters.values()))))

    detached = {name: p.detach() for name, p in parameters.items()}
    assert_near(grad(loss)(detached, x), of(x))
    several = vmap(grad(loss), in_dims=(None, 1))(detached, x)
    for b in range(B):
        assert_near({name: g[b] for name, g in several.items()}, of(x[:, b]))
    outputs = vmap(lambda x: functional_call(module, detached, (x,))[0], in_dims=1, out_dims=1)(x)
    assert_near({"output": outputs}, {"output": run(module, x)["output"]})


def compiled_of(module):
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize(("kind", "variant"), [*(("LSTM", v) for v in EVERY), ("GRU", "all"), ("RNN relu", "all")])
def test_a_module_compiles_whole(kind, variant):
    module = made(kind, variant, bidirectional=True)
    compiled = compiled_of(module)
    x, hx = input_of(module), states_of(module)
    assert_same_bits(run(compiled, x), run(module, x))
    assert_same_bits(with_gradients(module, x, hx, call=lambda _, *a: compiled(*a)), with_gradients(module, x, hx))
    module.train()
    found = with_gradients(module, x, hx, call=lambda _, *a: compiled(*a))
    assert all(r.isfinite().all() for r in found.values())
    assert all(r.any() for name, r in found.items() if kind != "RNN relu" or name == "output")
    results = [run(compiled, x)["output"] for _ in range(2)]
    assert torch.equal(*results) == (variant == "layer norm")
    if variant == "layer norm":
        assert_same_bits(found, with_gradients(module, x, hx))


@pytest.mark.parametrize("variant", ["recurrent dropout", "all"])
def test_a_module_compiles_whole_with_lengths_and_packed(variant):
    module = made("LSTM", variant).train()
    x = input_of(module)
    lengths, sizes = torch.tensor(LENGTHS), pack_padded_sequence(x, [6, 3, 1])
    compiled = compiled_of(lambda x, lengths: module(x, lengths=lengths)[0])
    assert compiled(x, lengths).isfinite().all()
    compiled = compiled_of(lambda data, sizes: module(PackedSequence(data, sizes))[0].data)
    assert compiled(*sizes[:2]).isfinite().all()


@every_lasting
@every_kind
def test_an_exported_program_gives_the_same_bits_at_other_sizes(kind, variant):
    module = made(kind, variant, batch_first=True, **DEEP)
    shapes = ({0: Dim("batch"), 1: Dim("steps")},)
    with torch.no_grad():
        program = torch.export.export(module, (torch.randn(3, 7, I),), dynamic_shapes=shapes).module()
    for size in ((1, 1), (2, 9), (8, 3)):
        x = torch.randn(*size, I)
        assert_same_bits(run(program, x), run(module, x))


# Models and encoders side by side.


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
@pytest.mark.parametrize("frozen", [False, True], ids=["ordinary", "frozen"])
@every_lasting
def test_a_model_gives_the_same_bits_with_and_without_gradients(variant, frozen, pooling):
    encoder = made("LSTM", variant, batch_first=True, **DEEP)
    plain = LSTM(I, H, batch_first=True, **DEEP)
    plain.load_state_dict(encoder.state_dict(), strict=False)
    heads = {"intent": ClassificationHead(4, pooling), "slots": TokenClassificationHead(6)}
    model = MultiTaskModel(nn.Embedding(30, I), encoder, heads).eval()
    tokens = torch.randint(30, (B, T))
    if frozen:
        pymtl.freeze(model)
    recorded = model(tokens, LENGTHS)
    assert all(z.requires_grad for z in recorded.values())
    output = encoder(model.embedding(tokens), lengths=LENGTHS)[0]
    slots = model.heads["slots"]
    assert_near(
        {"slots": recorded["slots"][0, :3]}, {"slots": (output @ slots.weight.t() + slots.bias)[0, :3]}, 1e-5, 1e-6
    )
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            silent = model(tokens, LENGTHS)
            assert_same_bits(silent, recorded)
    model.encoder = plain.eval()
    with torch.no_grad():
        assert not torch.equal(model(tokens, LENGTHS)["slots"], recorded["slots"])


@pytest.mark.parametrize("variant", EVERY)
def test_a_model_trains_the_same_with_and_without_a_record(variant):
    encoder = made("LSTM", variant, batch_first=True, **DEEP)
    heads = {"intent": ClassificationHead(4, "max"), "slots": TokenClassificationHead(6)}
    model = MultiTaskModel(nn.Embedding(30, I), encoder, heads).train()
    tokens = torch.randint(30, (B, T))
    torch.manual_seed(1)
    recorded = model(tokens, LENGTHS)
    with torch.no_grad():
        torch.manual_seed(1)
        assert_same_bits(model(tokens, LENGTHS), recorded)
    sum(z.sum() for z in recorded.values()).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("own", [False, True], ids=["one input", "own inputs"])
@every_lasting
def test_encoders_side_by_side_are_each_alone(variant, own):
    encoders = {f"e{k}": made("LSTM", variant, **DEEP) for k in range(3)}
    encoders["plain"] = LSTM(I, H, **DEEP).eval()
    several = ParallelLSTM(encoders).eval()
    packed = pack_padded_sequence(torch.randn(T, B, I), [6, 3, 1])
    data = torch.randn(len(packed.data), 4, I) if own else packed.data
    for recorded in (False, True):
        with torch.set_grad_enabled(recorded):
            tokens, last = several(data, packed.batch_sizes)
            for k, encoder in enumerate(encoders.values()):
                output, (h_n, _) = encoder(PackedSequence(data[:, k] if own else data, packed.batch_sizes))
                expected = {"tokens": output.data, "last": torch.cat(tuple(h_n[-2:]), -1)}
                assert_same_bits({"tokens": tokens[:, k], "last": last[:, k]}, expected)


def test_encoders_side_by_side_draw_in_training():
    encoders = {f"e{k}": LSTM(I, H, zoneout=1, recurrent_dropout=0.5) for k in range(2)}
    packed = pack_padded_sequence(torch.randn(T, B, I), [6, 3, 1])
    tokens, last = ParallelLSTM(encoders)(packed.data, packed.batch_sizes)
    assert not tokens.any()
    assert not last.any()
    encoders = {"a": GRU(I, H, zoneout=0.5)}
    with pytest.raises(TypeError, match="encoders"):
        ParallelLSTM(encoders)
