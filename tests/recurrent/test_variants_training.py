import itertools

import pytest
import torch
from formulas import (
    DEEP,
    LASTING,
    LENGTHS,
    B,
    H,
    I,
    T,
    assert_near,
    every_kind,
    made,
    of_direction,
    oracle,
)
from modules import KINDS, input_of, like, ours_of, run, states_of, tuple_of, with_gradients
from parity import assert_same_bits
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import pymtl
from pymtl import RNN

EVERY = [*LASTING, "recurrent dropout", "weight drop", "all"]
every_call = pytest.mark.parametrize("how", ["dense", "lengths", "packed", "sorted"])


def alive(module):
    """Positive weights: no relu is ever zero, and no gradient vanishes by chance."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith(("weight", "bias")):
                parameter.abs_().mul_(0.5)
    return module.double().train()


def call_of(how):
    """How to call a module with a padded batch [T, B, I], and the lengths that it has then."""

    def call(module, x, hx=None):
        if how == "lengths":
            return module(x, hx, lengths=LENGTHS)
        if how == "dense":
            return module(x, hx)
        return module(pack_padded_sequence(x, LENGTHS if how == "packed" else [6, 3, 1], enforce_sorted=False), hx)

    return call, {"dense": [T] * B, "sorted": [6, 3, 1]}.get(how, LENGTHS)


def padded(call):
    """The call with its output padded."""

    def inner(*args):
        output, state = call(*args)
        if isinstance(output, PackedSequence):
            output = nn.utils.rnn.pad_packed_sequence(output, total_length=T)[0]
        return output, state

    return inner


# Recurrent dropout.


def probe(hidden_size=64, p=0.5, **options):
    """An RNN whose states are h_0 times the mask at every step."""
    module = RNN(2, hidden_size, nonlinearity="relu", bias=False, recurrent_dropout=p, **options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.eye(hidden_size) if "_hh_" in name else torch.zeros_like(parameter))
    return module


def masks_of(module, x, lengths=None):
    """h_n [L*D, B, H] from ones, and the masks that they show."""
    rows = module.num_layers * (2 if module.bidirectional else 1)
    h0 = torch.ones(rows, x.shape[1], module.hidden_size)
    _, h_n = module(x, h0, lengths=lengths)
    return h_n.detach(), h_n.detach() > 0


def test_a_mask_is_the_same_at_all_steps_and_scaled():
    module = probe(p=0.5)
    x, h0 = torch.randn(T, B, 2), torch.ones(1, B, 64)
    output, _ = module(x, h0)
    kept = output[0] > 0
    assert 0.3 < kept.float().mean() < 0.7
    for t in range(T):
        assert torch.equal(output[t], kept * 2.0 ** (t + 1))
    for p in (0.1, 0.25, 0.9):
        pymtl.set_variants(module, recurrent_dropout=p)
        first = module(x[:1], h0)[0]
        assert_near({"kept": first[first > 0]}, {"kept": first[first > 0] * 0 + 1 / (1 - p)}, rtol=1e-3, atol=0)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["dense", "lengths"])
def test_masks_differ_between_sequences_directions_layers_and_calls_and_follow_the_seed(lengths):
    module = probe(**DEEP)
    x = torch.randn(T, B, 2)
    torch.manual_seed(5)
    h_n, masks = masks_of(module, x, lengths)
    every = list(masks.flatten(0, 1)) + list(masks_of(module, x, lengths)[1].flatten(0, 1))
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(every, 2))
    powers = torch.tensor(lengths or [T] * B)
    assert torch.equal(h_n, masks * (2.0**powers).view(1, B, 1))
    torch.manual_seed(5)
    assert torch.equal(masks_of(module, x, lengths)[0], h_n)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_units_are_dropped_at_the_rate_asked_for(p):
    _, masks = masks_of(probe(100, p), torch.randn(1, 400, 2))
    assert abs(1 - p - masks.double().mean()) < 4 * (p * (1 - p) / masks.numel()) ** 0.5


@every_kind
def test_all_units_dropped_means_no_recurrence(kind):
    module = ours_of(kind, I, H, recurrent_dropout=1, dtype=torch.float64, **DEEP).train()
    x = input_of(module)
    rows = 2 * module.num_layers
    actual = with_gradients(module, x)
    assert_near(actual, with_gradients(module, x, call=lambda *a: oracle(*a, dropout=x.new_zeros(rows, B, H))))
    assert not actual["gradient of weight_hh_l0"].any()


def dropped_units(module, call, x, hx):
    """Whose column of weight_hh has a gradient: [L*D, B, H]."""
    weights = [p for name, p in module.named_parameters() if name.startswith("weight_hh")]
    output, _ = call(module, x, hx)
    rows = []
    for b in range(x.shape[1]):
        gradients = torch.autograd.grad(output[:, b].sum(), weights, retain_graph=True)
        rows.append(torch.stack([g.any(0) for g in gradients]))
    return torch.stack(rows, 1)


@every_call
@pytest.mark.parametrize("layer_norm", [False, True], ids=["plain", "layer norm"])
@every_kind
def test_recurrent_dropout_is_the_formulas_with_the_masks_drawn(kind, layer_norm, how):
    module = alive(ours_of(kind, I, H, recurrent_dropout=0.25, layer_norm=layer_norm, **DEEP))
    x, hx = input_of(module, B, T).abs(), like(states_of(module), [s.abs() for s in tuple_of(states_of(module))])
    call, lengths = call_of(how)
    torch.manual_seed(1)
    kept = dropped_units(module, padded(call), x, hx)
    assert not kept.all()
    assert kept.any()
    actual = with_gradients(module, x, hx, call=padded(call))
    dropout = kept.double() / 0.75
    expected = with_gradients(module, x, hx, call=lambda *a: oracle(*a, lengths=lengths, dropout=dropout))
    assert_near(actual, expected)


# Weight drop.


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_numbers_of_weight_hh_become_zero_and_the_others_grow(p):
    module = RNN(2, 64, nonlinearity="relu", bias=False, weight_drop=p)
    with torch.no_grad():
        module.weight_ih_l0.zero_()
        module.weight_hh_l0.abs_().add_(0.5)
    # One sequence for each unit of h_0: the first states are the columns of the matrix used.
    x, h0 = torch.zeros(1, 64, 2), torch.eye(64).unsqueeze(0)
    used = [module(x, h0)[0][0].t() for _ in range(2)]
    for matrix in used:
        kept = matrix != 0
        assert abs(1 - p - kept.double().mean()) < 4 * (p * (1 - p) / kept.numel()) ** 0.5
        assert_near({"kept": matrix[kept]}, {"kept": module.weight_hh_l0[kept] / (1 - p)}, rtol=1e-3, atol=0)
    assert not torch.equal(used[0], used[1])
    torch.manual_seed(5)
    first = module(x, h0)[0]
    torch.manual_seed(5)
    assert torch.equal(module(x, h0)[0], first)


@every_call
@pytest.mark.parametrize("layer_norm", [False, True], ids=["plain", "layer norm"])
@every_kind
def test_weight_drop_is_the_formulas_and_gradients_are_zero_where_dropped(kind, layer_norm, how):
    module = alive(ours_of(kind, I, H, weight_drop=0.25, layer_norm=layer_norm, **DEEP))
    x, hx = input_of(module, B, T).abs(), like(states_of(module), [s.abs() for s in tuple_of(states_of(module))])
    call, lengths = call_of(how)
    actual = with_gradients(module, x, hx, call=padded(call))
    kept = {n: actual[f"gradient of {n}"] != 0 for n, _ in module.named_parameters() if n.startswith("weight_hh")}
    assert all(0.5 < k.double().mean() < 0.95 for k in kept.values())

    def expected(module, *args):
        parameters = dict(module.named_parameters())
        parameters |= {name: parameters[name] * mask / 0.75 for name, mask in kept.items()}
        return oracle(module, *args, lengths=lengths, parameters=parameters)

    assert_near(actual, with_gradients(module, x, hx, call=expected))


@every_kind
def test_a_weight_dropped_whole_is_zero(kind):
    module = ours_of(kind, I, H, weight_drop=1, **DEEP).train()
    other = ours_of(kind, I, H, **DEEP)
    other.load_state_dict(module.state_dict())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.startswith("weight_hh"):
                parameter.zero_()
    x, hx = input_of(module), states_of(module)
    assert_same_bits(run(module, x, hx), run(other, x, hx))
    actual = with_gradients(module, x, hx)
    assert not any(g.any() for name, g in actual.items() if "weight_hh" in name)


@every_kind
def test_a_parametrised_weight_is_dropped_and_learns(kind):
    module = ours_of(kind, I, H, weight_drop=0.5).double()
    parametrizations.weight_norm(module, "weight_hh_l0")
    plain = ours_of(kind, I, H).double()
    x = input_of(module)
    output, state = module(x)
    (output.sum() + sum(s.sum() for s in tuple_of(state))).backward()
    for p in module.parameters():
        assert p.grad.isfinite().all()
        assert p.grad.any()
    plain.load_state_dict({n: getattr(module, n).detach() for n in plain.state_dict()})
    assert_near(run(module.eval(), x), run(plain, x))
    assert not torch.equal(run(module.train(), x)["output"], run(plain, x)["output"])


# Zoneout.


def zoneouts(*values):
    """Of every kind; pairs are an LSTM's."""
    cases = [(kind, z) for kind in KINDS for z in values if kind == "LSTM" or not isinstance(z, tuple)]
    return pytest.mark.parametrize(("kind", "zoneout"), cases, ids=str)


@zoneouts(0.3, (0.3, 0.0), (0.0, 0.3), (0.2, 0.6))
@pytest.mark.parametrize("layer_norm", [False, True], ids=["plain", "layer norm"])
def test_a_unit_keeps_its_state_or_takes_the_new_one_bit_for_bit(kind, layer_norm, zoneout):
    module = ours_of(kind, I, 50, zoneout=zoneout, layer_norm=layer_norm).train()
    plain = ours_of(kind, I, 50, layer_norm=layer_norm)
    plain.load_state_dict(module.state_dict())
    rates = zoneout if isinstance(zoneout, tuple) else (zoneout, zoneout)
    state, kept, differ = states_of(module, 20), [[], []], [[], []]
    with torch.no_grad():
        for x in input_of(module, 20, 8).split(1):
            before, new = tuple_of(state), tuple_of(plain(x, state)[1])
            output, state = module(x, state)
            for s, (old, fresh, now) in enumerate(zip(before, new, tuple_of(state))):
                assert ((now == old) | (now == fresh)).all()
                kept[s].append((now == old) & (old != fresh))
                differ[s].append(old != fresh)
            assert torch.equal(output, tuple_of(state)[0])
    for rate, masks, where in zip(rates, kept, differ):
        if masks:
            found = torch.stack(masks)[torch.stack(where)].double()
            assert len(found) > 3000
            assert abs(found.mean() - rate) <= 4 * (rate * (1 - rate) / len(found)) ** 0.5
            assert rate == 0 or all(not torch.equal(a, b) for a, b in itertools.combinations(masks, 2))


def kept_units(module, x, hx, output, state):
    """What zoneout kept in a whole call, from its results alone: [L*D, T, B, H] for h and for c of one layer."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    directions, steps = output.shape[-1] // H, x.shape[0]
    keep_h, keep_c = torch.zeros(2, directions, steps, x.shape[1], H, dtype=x.dtype)
    for d in range(directions):
        p = of_direction(parameters, 0, d)
        tokens, own = (x.flip(0), output.flip(0)) if d else (x, output)
        own = own[..., d * H : (d + 1) * H]
        h_before = torch.cat([tuple_of(hx)[0][d : d + 1], own[:-1]])
        k_h = own == h_before
        keep_h[d] = k_h.flip(0) if d else k_h
        if module.mode != "LSTM":
            continue
        sums = tokens @ p["weight_ih"].t() + p["bias_ih"] + h_before @ p["weight_hh"].t() + p["bias_hh"]
        i, f, g, o = sums.chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        paths = torch.tensor(list(itertools.product([0.0, 1.0], repeat=steps)), dtype=x.dtype)[..., None, None]
        c = hx[1][d].expand(len(paths), -1, -1)
        fits = torch.ones_like(c, dtype=torch.bool)
        for t in range(steps):
            new = f[t] * c + i[t] * g[t]
            fits &= k_h[t] | ((o[t] * new.tanh() - own[t]).abs() < 1e-12)
            c = paths[:, t] * c + (1 - paths[:, t]) * new
        fits &= (c - state[1][d]).abs() < 1e-12
        assert fits.any(0).all()
        path = paths[fits.double().argmax(0)][..., 0, 0].permute(2, 0, 1)
        keep_c[d] = path.flip(0) if d else path
    return keep_h, keep_c


@zoneouts(0.4, (0.4, 0.0), (0.0, 0.4), (0.2, 0.6))
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forwards", "both ways"])
@every_call
def test_zoneout_in_training_is_the_formulas_with_the_masks_drawn(kind, bidirectional, zoneout, how):
    module = alive(ours_of(kind, I, H, zoneout=zoneout, bidirectional=bidirectional))
    x, hx = input_of(module, B, T).abs(), like(states_of(module), [s.abs() for s in tuple_of(states_of(module))])
    call, lengths = call_of(how)
    actual = with_gradients(module, x, hx, call=padded(call))
    keep = torch.zeros(2, 2 if bidirectional else 1, T, B, H, dtype=x.dtype)
    last = [actual[name] for name in ("h_n", "c_n") if name in actual]
    for b, length in enumerate(lengths):
        one = slice(b, b + 1)
        first, final = (tuple(state[:, one] for state in states) for states in (tuple_of(hx), last))
        found = kept_units(module, x[:length, one], first, actual["output"][:length, one], final)
        keep[:, :, :length, one] = torch.stack(found)
    assert keep.any()
    expected = with_gradients(module, x, hx, call=lambda *a: oracle(*a, lengths=lengths, keep=tuple(keep)))
    assert_near(actual, expected)


@every_call
@pytest.mark.parametrize("layer_norm", [False, True], ids=["plain", "layer norm"])
@every_kind
def test_states_never_change_at_zoneout_one(kind, layer_norm, how):
    module = ours_of(kind, I, H, zoneout=1, layer_norm=layer_norm, bidirectional=True).train()
    x, hx = input_of(module, B, T), states_of(module)
    call, lengths = call_of(how)
    for training in (True, False):
        actual = run(lambda *a: padded(call)(module.train(training), *a), x, hx)  # noqa: B023
        h0, *c0 = tuple_of(hx)
        assert torch.equal(actual["h_n"], h0)
        assert not c0 or torch.equal(actual["c_n"], c0[0])
        for b, length in enumerate(lengths):
            assert torch.equal(actual["output"][:length, b], h0[:, b].flatten().expand(length, -1))
            assert not actual["output"][length:, b].any()


@every_kind
def test_everything_at_once_follows_the_seed_and_changes_from_call_to_call(kind):
    module = made(kind, "all", dropout=0.25, **DEEP).train()
    x, hx = input_of(module), states_of(module)
    assert_same_bits(with_gradients(module, x, hx), with_gradients(module, x, hx))
    assert not torch.equal(run(module, x, hx)["output"], run(module, x, hx)["output"])
    torch.manual_seed(1)
    silent = run(module, x, hx)
    assert_same_bits(silent, {name: r for name, r in with_gradients(module, x, hx).items() if name in silent})


@every_kind
def test_everything_at_once_learns(kind):
    module = made(kind, "all", **DEEP).train()
    head = nn.Linear(2 * H, 1)
    optimizer = torch.optim.Adam([*module.parameters(), *head.parameters()], lr=0.02)
    x = torch.randn(T, 32, I)
    target = x[..., 0].cumsum(0).sign()

    def loss():
        return (head(module(x)[0]).squeeze(-1) - target).square().mean()

    before = loss().item()
    for _ in range(40):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.7 * before
