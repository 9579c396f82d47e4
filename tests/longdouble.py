"""The truth of the float64 tests: the ops and their derivatives in long double, written out by hand."""

import numpy as np
import pytest
from parity import wide

# Where long double is no wider than float64 there is no truth to compare with.
needs_long_double = pytest.mark.skipif(
    np.finfo(np.longdouble).nmant <= np.finfo(np.float64).nmant, reason="long double is float64 on this platform"
)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def token_indices(sample):
    """For each sequence, the rows of its tokens in the flat input."""
    if sample.batch_sizes is None:
        steps, batch = sample.input.shape[:2]
        return [np.arange(steps) * batch + row for row in range(batch)]
    sizes = sample.batch_sizes.tolist()
    starts = np.cumsum([0, *sizes])
    return [np.array([starts[t] + row for t, size in enumerate(sizes) if size > row]) for row in range(sizes[0])]


def lstm(sample, seeds):
    """Results and gradients under the names of ``samples.with_gradients``, by backpropagation through time."""
    weights = sample.weights
    G, H, I = len(weights.reverse), weights.weight_hh[0].shape[1], sample.input.shape[-1]
    bias = len(weights.bias_ih) > 0
    sequences = token_indices(sample)
    x = wide(sample.input).reshape(-1, I)
    zeros = np.zeros((G, len(sequences), H), np.longdouble)
    h0 = zeros if sample.h0 is None else wide(sample.h0)
    c0 = zeros if sample.c0 is None else wide(sample.c0)
    output = np.zeros((len(x), G * H), np.longdouble)
    h_n, c_n = zeros.copy(), zeros.copy()
    d_output = wide(seeds["output"]).reshape(-1, G * H) if "output" in seeds else np.zeros_like(output)
    d_h_n = wide(seeds["h_n"]) if "h_n" in seeds else zeros
    d_c_n = wide(seeds["c_n"]) if "c_n" in seeds else zeros
    d_x, d_h0, d_c0 = np.zeros_like(x), zeros.copy(), zeros.copy()
    gradients = {}

    for g, reverse in enumerate(weights.reverse):
        w_ih, w_hh = wide(weights.weight_ih[g]), wide(weights.weight_hh[g])
        b = wide(weights.bias_ih[g]) + wide(weights.bias_hh[g]) if bias else np.zeros(4 * H, np.longdouble)
        d_w_ih, d_w_hh, d_b = np.zeros_like(w_ih), np.zeros_like(w_hh), np.zeros_like(b)
        mine = slice(g * H, (g + 1) * H)
        for row, tokens in enumerate(sequences):
            walk = tokens[::-1] if reverse else tokens
            h, c = h0[g, row], c0[g, row]
            tape = []
            for n in walk:
                a = w_ih @ x[n] + w_hh @ h + b
                i, f, o = sigmoid(a[:H]), sigmoid(a[H : 2 * H]), sigmoid(a[3 * H :])
                u = np.tanh(a[2 * H : 3 * H])
                tape.append((n, i, f, u, o, h, c))
                c = f * c + i * u
                h = o * np.tanh(c)
                output[n, mine] = h
            h_n[g, row], c_n[g, row] = h, c
            d_h, d_c = d_h_n[g, row], d_c_n[g, row]
            for n, i, f, u, o, h_before, c_before in reversed(tape):
                d_h = d_h + d_output[n, mine]
                tanh_c = np.tanh(f * c_before + i * u)
                d_c = d_c + d_h * o * (1 - tanh_c**2)
                d_a = np.concatenate(
                    [
                        d_c * u * i * (1 - i),
                        d_c * c_before * f * (1 - f),
                        d_c * i * (1 - u**2),
                        d_h * tanh_c * o * (1 - o),
                    ]
                )
                d_w_ih += np.outer(d_a, x[n])
                d_w_hh += np.outer(d_a, h_before)
                d_b += d_a
                d_x[n] += w_ih.T @ d_a
                d_h, d_c = w_hh.T @ d_a, d_c * f
            d_h0[g, row], d_c0[g, row] = d_h, d_c
        gradients |= {f"weight_ih[{g}]": d_w_ih, f"weight_hh[{g}]": d_w_hh}
        if bias:
            gradients |= {f"bias_ih[{g}]": d_b, f"bias_hh[{g}]": d_b}

    gradients |= {"input": d_x.reshape(sample.input.shape), "h0": d_h0, "c0": d_c0}
    leading = sample.input.shape[:-1]
    return {"output": output.reshape(*leading, G * H), "h_n": h_n, "c_n": c_n} | {
        f"gradient of {name}": gradients[name] for name in sample.tensors()
    }


def cross_entropy(z, y, weight, ignore_index, smoothing):
    """The loss of one task and its gradient."""
    z, y = wide(z), y.numpy()
    rows, classes = z.shape
    w = np.ones(classes, np.longdouble) if weight is None else wide(weight)
    loss, total, gradient = np.longdouble(0), np.longdouble(0), np.zeros_like(z)
    for n in range(rows):
        if y[n] == ignore_index:
            continue
        shifted = z[n] - z[n].max()
        log_p = shifted - np.log(np.exp(shifted).sum())
        share = smoothing / np.longdouble(classes) * w
        share[y[n]] += (1 - np.longdouble(smoothing)) * w[y[n]]
        loss -= (share * log_p).sum()
        gradient[n] = share.sum() * np.exp(log_p) - share
        total += w[y[n]]
    return (loss / total, gradient / total) if total > 0 else (loss, gradient)


def mean_squared_error(z, y):
    z, y = wide(z), wide(y)
    labelled = ~np.isnan(y)
    count = max(labelled.sum(), 1)
    difference = np.where(labelled, z - np.where(labelled, y, 0), 0)
    return (difference**2).sum() / count, 2 * difference / count


def binary_cross_entropy(z, y, weight, ignore_index):
    z, y = wide(z), wide(y)
    w = np.ones(z.shape[1], np.longdouble) if weight is None else wide(weight)
    labelled = ~np.isnan(y) & (y != ignore_index)
    y = np.where(labelled, y, 0)
    count = max(labelled.sum(), 1)
    log_p = np.minimum(z, 0) - np.log1p(np.exp(-np.abs(z)))
    log_q = log_p - z
    loss = np.where(labelled, -(w * y * log_p + (1 - y) * log_q), 0).sum() / count
    gradient = np.where(labelled, -(w * y * np.exp(log_q) - (1 - y) * np.exp(log_p)), 0) / count
    return loss, gradient
