"""Float64 twins of the submodules: every head, query and key in a loop. Numpy only, nothing of ours."""

import numpy as np


def rotated(x, angle):
    """A head's vector ``[dim]`` turned by position: the first half of it against the second."""
    half = len(x) // 2
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([x[:half] * cos - x[half:] * sin, x[half:] * cos + x[:half] * sin])


def heads(x, weight, bias, count, angles):
    """Rotated heads ``[count, tokens, dim]`` of inputs ``[tokens, in]``."""
    outputs = x @ weight.T + bias
    dim = weight.shape[0] // count
    return np.array(
        [[rotated(outputs[t, h * dim : (h + 1) * dim], angles[t]) for t in range(len(x))] for h in range(count)]
    )


def scores(query, key, scaling, softcap=None):
    """``[heads, queries, keys]``; head ``h`` reads key head ``h // (heads / groups)``."""
    own = len(query) // len(key)
    out = np.empty((len(query), query.shape[1], key.shape[1]))
    for h in range(len(query)):
        for t in range(query.shape[1]):
            for s in range(key.shape[1]):
                value = scaling * float(np.dot(query[h, t], key[h // own, s]))
                out[h, t, s] = value if softcap is None else softcap * np.tanh(value / softcap)
    return out


def visible(tokens, window=None):
    """Who sees whom: itself and what came before, at most ``window`` tokens in all."""
    seen = np.zeros((tokens, tokens), dtype=bool)
    for t in range(tokens):
        for s in range(tokens):
            seen[t, s] = s <= t and (window is None or t - s < window)
    return seen


def attention(values, seen, sinks=None):
    """Softmax of the scores that a query sees, with a score per head that brings nothing."""
    out = np.zeros_like(values)
    for h in range(len(values)):
        for t in range(values.shape[1]):
            mine = np.exp(values[h, t][seen[t]])
            total = mine.sum() + (0.0 if sinks is None else np.exp(sinks[h]))
            out[h, t][seen[t]] = mine / total
    return out


def score_loss(at, target, seen, weights, attended=None):
    """Sum over heads, queries and visible keys of squares; with attention ``p``, of ``d' (diag(p) - p p') d``."""
    total = 0.0
    for h in range(len(at)):
        for t in range(at.shape[1]):
            d = (at[h, t] - target[h, t])[seen[t]]
            if attended is None:
                total += weights[t] * float(d @ d)
            else:
                p = attended[h, t][seen[t]]
                total += weights[t] * float(d @ (np.diag(p) - np.outer(p, p)) @ d)
    return total


def mixed(attended, value):
    """Outputs of all heads beside each other, ``[tokens, heads * dim]``."""
    own = len(attended) // len(value)
    return np.concatenate([attended[h] @ value[h // own] for h in range(len(attended))], axis=1)
