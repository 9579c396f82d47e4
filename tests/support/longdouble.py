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


def lstm_step(x, q, h, c):
    """The next h and c, and a function from their gradients to those of the two projections, h and c."""
    H = len(h)
    a = x + q
    i, f, o = sigmoid(a[:H]), sigmoid(a[H : 2 * H]), sigmoid(a[3 * H :])
    u = np.tanh(a[2 * H : 3 * H])
    after = f * c + i * u
    tanh_c = np.tanh(after)

    def back(d_h, d_c):
        d_c = d_c + d_h * o * (1 - tanh_c**2)
        parts = (d_c * u * i * (1 - i), d_c * c * f * (1 - f), d_c * i * (1 - u**2), d_h * tanh_c * o * (1 - o))
        d_a = np.concatenate(parts)
        return d_a, d_a, np.zeros_like(h), d_c * f

    return o * tanh_c, after, back


def gru_step(x, q, h, c):
    H = len(h)
    r, z = sigmoid(x[:H] + q[:H]), sigmoid(x[H : 2 * H] + q[H : 2 * H])
    n = np.tanh(x[2 * H :] + r * q[2 * H :])

    def back(d_h, d_c):
        d_n = d_h * (1 - z) * (1 - n**2)
        d_r, d_z = d_n * q[2 * H :] * r * (1 - r), d_h * (h - n) * z * (1 - z)
        return np.concatenate([d_r, d_z, d_n]), np.concatenate([d_r, d_z, d_n * r]), d_h * z, d_c

    return (1 - z) * n + z * h, c, back


def rnn_tanh_step(x, q, h, c):
    after = np.tanh(x + q)

    def back(d_h, d_c):
        d_a = d_h * (1 - after**2)
        return d_a, d_a, np.zeros_like(h), d_c

    return after, c, back


def rnn_relu_step(x, q, h, c):
    after = np.maximum(x + q, 0)

    def back(d_h, d_c):
        d_a = np.where(after > 0, d_h, 0)
        return d_a, d_a, np.zeros_like(h), d_c

    return after, c, back


STEPS = {"LSTM": lstm_step, "GRU": gru_step, "RNN_TANH": rnn_tanh_step, "RNN_RELU": rnn_relu_step}


def rnn(sample, seeds):
    """Results and gradients under the names of ``samples.with_gradients``, by backpropagation through time."""
    weights = sample.weights
    G, H, I = len(weights.reverse), weights.weight_hh[0].shape[1], sample.input.shape[-1]
    step = STEPS[weights.mode]
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
        nothing = np.zeros(len(w_hh), np.longdouble)
        b_ih = wide(weights.bias_ih[g]) if bias else nothing
        b_hh = wide(weights.bias_hh[g]) if bias else nothing
        d_w_ih, d_w_hh, d_b_ih, d_b_hh = (np.zeros_like(w) for w in (w_ih, w_hh, b_ih, b_hh))
        mine = slice(g * H, (g + 1) * H)
        for row, tokens in enumerate(sequences):
            walk = tokens[::-1] if reverse else tokens
            h, c = h0[g, row], c0[g, row]
            tape = []
            for n in walk:
                before = h
                h, c, back = step(w_ih @ x[n] + b_ih, w_hh @ h + b_hh, h, c)
                tape.append((n, before, back))
                output[n, mine] = h
            h_n[g, row], c_n[g, row] = h, c
            d_h, d_c = d_h_n[g, row], d_c_n[g, row]
            for n, before, back in reversed(tape):
                d_a, d_q, d_h, d_c = back(d_h + d_output[n, mine], d_c)
                d_w_ih += np.outer(d_a, x[n])
                d_w_hh += np.outer(d_q, before)
                d_b_ih += d_a
                d_b_hh += d_q
                d_x[n] += w_ih.T @ d_a
                d_h = d_h + w_hh.T @ d_q
            d_h0[g, row], d_c0[g, row] = d_h, d_c
        gradients |= {f"weight_ih[{g}]": d_w_ih, f"weight_hh[{g}]": d_w_hh}
        if bias:
            gradients |= {f"bias_ih[{g}]": d_b_ih, f"bias_hh[{g}]": d_b_hh}

    gradients |= {"input": d_x.reshape(sample.input.shape), "h0": d_h0, "c0": d_c0}
    leading = sample.input.shape[:-1]
    results = {"output": output.reshape(*leading, G * H), "h_n": h_n}
    results |= {"c_n": c_n} if weights.mode == "LSTM" else {}
    return results | {f"gradient of {name}": gradients[name] for name in sample.tensors()}


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
