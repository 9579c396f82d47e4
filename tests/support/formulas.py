"""LSTM, GRU and RNN with all their variants as the papers write them: one sequence, direction and step at a time."""

import pytest
import torch
from modules import (
    KINDS,
    ours_of,
    tuple_of,
)
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

I, H, T, B = 5, 7, 6, 3
LENGTHS = [3, 6, 1]
DEEP = {"num_layers": 2, "bidirectional": True}
LASTING = ("layer norm", "zoneout", "both")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_lasting = pytest.mark.parametrize("variant", LASTING)


def options_of(kind, variant):
    """Constructor options by a name of what they do."""
    zoneout = {"zoneout": (0.3, 0.15) if kind == "LSTM" else 0.3}
    return {
        "layer norm": {"layer_norm": True},
        "zoneout": zoneout,
        "both": {"layer_norm": True, **zoneout},
        "recurrent dropout": {"recurrent_dropout": 0.25},
        "weight drop": {"weight_drop": 0.25},
        "all": {"layer_norm": True, "recurrent_dropout": 0.25, "weight_drop": 0.25, **zoneout},
    }[variant]


def made(kind, variant, input_size=I, hidden_size=H, **options):
    """A module in eval mode whose gains are not just ones."""
    module = ours_of(kind, input_size, hidden_size, **options_of(kind, variant), **options).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith(("gain", "bias_c")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def normal(a, gain):
    centred = a - a.mean()
    return gain * centred / (centred.square().mean() + 1e-5).sqrt()


def cell(mode, p, x, h, c, seen, layer_norm):
    """One step of one sequence: candidates for h and c; ``seen`` is what weight_hh multiplies."""
    a, q = p["weight_ih"] @ x, p["weight_hh"] @ seen
    if layer_norm:
        a, q = normal(a, p["gain_ih"]), normal(q, p["gain_hh"])
    if "bias_ih" in p:
        a, q = a + p["bias_ih"], q + p["bias_hh"]
    if mode == "LSTM":
        i, f, g, o = (a + q).split(h.numel())
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        inner = normal(c, p["gain_c"]) + p.get("bias_c", 0) if layer_norm else c
        return o.sigmoid() * inner.tanh(), c
    if mode == "GRU":
        (a_r, a_z, a_n), (q_r, q_z, q_n) = a.split(h.numel()), q.split(h.numel())
        r, z = (a_r + q_r).sigmoid(), (a_z + q_z).sigmoid()
        return (1 - z) * (a_n + r * q_n).tanh() + z * h, c
    return (a + q).tanh() if mode == "RNN_TANH" else (a + q).relu(), c


def of_direction(parameters, layer, direction):
    suffix = f"_l{layer}" + ("_reverse" if direction else "")
    return {name.removesuffix(suffix): p for name, p in parameters.items() if name.endswith(suffix)}


def stack(module, x, hx, lengths, parameters=None, dropout=None, keep=None):
    """The module's formulas over [T, B, I], one sequence, layer, direction and step at a time.

    ``dropout`` [L*D, B, H] factors of h; ``keep`` for h and for c, numbers or [L*D, T, B, H].
    """
    parameters = dict(module.named_parameters()) if parameters is None else parameters
    directions = 2 if module.bidirectional else 1
    rows = module.num_layers * directions
    zeros = x.new_zeros(rows, x.shape[1], module.hidden_size)
    h0, c0 = (zeros, zeros) if hx is None else (*tuple_of(hx), zeros)[:2]
    keep = keep or (module._pymtl_variants.zoneout_h, module._pymtl_variants.zoneout_c)
    keep = [k if isinstance(k, torch.Tensor) else x.new_full((rows, *x.shape[:2], 1), k) for k in keep]
    outputs, last_h, last_c = [], {}, {}
    for b, length in enumerate(lengths):
        tokens = list(x[:length, b])
        for layer in range(module.num_layers):
            found = []
            for d in range(directions):
                row = layer * directions + d
                p = of_direction(parameters, layer, d)
                h, c, states = h0[row, b], c0[row, b], [None] * length
                for t in reversed(range(length)) if d else range(length):
                    seen = h if dropout is None else h * dropout[row, b]
                    h_new, c_new = cell(module.mode, p, tokens[t], h, c, seen, module._pymtl_variants.layer_norm)
                    k_h, k_c = keep[0][row, t, b], keep[1][row, t, b]
                    h, c = k_h * h + (1 - k_h) * h_new, k_c * c + (1 - k_c) * c_new
                    states[t] = h
                found.append(states)
                last_h[row, b], last_c[row, b] = h, c
            tokens = [torch.cat(parts) for parts in zip(*found)]
        padding = [torch.zeros_like(tokens[0])] * (x.shape[0] - length)
        outputs.append(torch.stack(tokens + padding))
    states = [
        torch.stack([torch.stack([last[row, b] for b in range(len(lengths))]) for row in range(rows)])
        for last in (last_h, last_c)
    ]
    return torch.stack(outputs, 1), tuple(states) if module.mode == "LSTM" else states[0]


def oracle(module, input, hx=None, *, lengths=None, **masks):
    """:func:`stack` called as the module is, in any layout."""
    if isinstance(input, PackedSequence):
        x, lengths = pad_packed_sequence(input)
        output, state = stack(module, x, hx, lengths.tolist(), **masks)
        return pack_padded_sequence(output, lengths, enforce_sorted=input.sorted_indices is None), state
    if input.dim() == 2:
        wide = None if hx is None else tuple(s.unsqueeze(1) for s in tuple_of(hx))
        output, state = stack(module, input.unsqueeze(1), wide, [len(input)], **masks)
        state = tuple(s.squeeze(1) for s in tuple_of(state))
        return output.squeeze(1), state if module.mode == "LSTM" else state[0]
    x = input.transpose(0, 1) if module.batch_first else input
    output, state = stack(module, x, hx, [x.shape[0]] * x.shape[1] if lengths is None else lengths, **masks)
    return output.transpose(0, 1) if module.batch_first else output, state


def assert_near(actual, expected, rtol=1e-9, atol=1e-11):
    assert actual.keys() == expected.keys()
    for name in actual:
        found, wanted = actual[name].to(torch.float64), expected[name].to(torch.float64)
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
