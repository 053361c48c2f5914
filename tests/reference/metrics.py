"""Float64 twins of the measures: the definitions, written out."""

import numpy as np


def softmax(logits):
    """Softmax over the last axis, ``[tokens, vocab]``."""
    logits = np.asarray(logits, np.float64)
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def kl_nats(reference_logits, logits):
    """``sum p log(p / q)`` token by token, skipping ``p = 0``."""
    p, q = softmax(reference_logits), softmax(logits)
    result = []
    for row_p, row_q in zip(p, q, strict=True):
        seen = row_p > 0
        result.append(np.sum(row_p[seen] * np.log(row_p[seen] / row_q[seen])))
    return np.array(result)


def token_nll(logits, targets):
    """``-log softmax(logits)[target]`` token by token."""
    probability = softmax(logits)
    return np.array([-np.log(row[target]) for row, target in zip(probability, targets, strict=True)])


def sqnr_db(reference, value):
    """``10 log10(signal / noise)``."""
    reference, value = np.asarray(reference, np.float64), np.asarray(value, np.float64)
    return 10 * np.log10(np.sum(reference**2) / np.sum((reference - value) ** 2))


def h_error(weight, value, gram):
    """``tr(E G E') / tr(W G W')``."""
    weight, value, gram = (np.asarray(a, np.float64) for a in (weight, value, gram))
    error = value - weight
    return np.trace(error @ gram @ error.T) / np.trace(weight @ gram @ weight.T)


def divergence(reference_logits, logits, targets, mask):
    """Every figure of a comparison, from arrays over all windows.

    Args:
        reference_logits: ``[windows, positions, vocab]``.
        logits: the same of the other model.
        targets: ``[windows, positions]``.
        mask: ``[windows, positions]``, what is scored.
    """
    kl, nll, reference_nll, agree, means, counts = [], [], [], [], [], []
    for window in range(len(targets)):
        keep = mask[window]
        if not keep.any():
            continue
        p, q, wanted = reference_logits[window][keep], logits[window][keep], targets[window][keep]
        values = kl_nats(p, q)
        kl.extend(values)
        nll.extend(token_nll(q, wanted))
        reference_nll.extend(token_nll(p, wanted))
        agree.extend(p.argmax(-1) == q.argmax(-1))
        means.append(values.mean())
        counts.append(len(values))
    means, counts = np.array(means), np.array(counts)
    mean = np.mean(kl)
    # of a ratio estimator; with equal counts it is std(means) / sqrt(windows)
    spread = np.sqrt(len(means) / (len(means) - 1) * np.sum((counts * (means - mean)) ** 2)) / counts.sum()
    return {
        "perplexity": np.exp(np.mean(nll)),
        "reference_perplexity": np.exp(np.mean(reference_nll)),
        "kl_nats": mean,
        "kl_stderr": spread,
        "percentiles": np.percentile(kl, [50, 90, 99, 100]),
        "top1_agreement": np.mean(agree),
        "tokens": len(kl),
    }
