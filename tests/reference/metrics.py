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
    kl, nll, reference_nll, agree, before, now = [], [], [], [], [], []
    by_window = {"kl": [], "nll": [], "ratio": [], "agree": []}
    counts = []
    for window in range(len(targets)):
        keep = mask[window]
        if not keep.any():
            continue
        p, q, wanted = reference_logits[window][keep], logits[window][keep], targets[window][keep]
        values = kl_nats(p, q)
        kl.extend(values)
        own, others, same = token_nll(q, wanted), token_nll(p, wanted), p.argmax(-1) == q.argmax(-1)
        nll.extend(own)
        reference_nll.extend(others)
        agree.extend(same)
        before.extend(p.argmax(-1) == wanted)
        now.extend(q.argmax(-1) == wanted)
        for name, column in (("kl", values), ("nll", own), ("ratio", own - others), ("agree", same)):
            by_window[name].append(np.mean(column))
        counts.append(len(values))
    counts = np.array(counts)

    def spread(name):
        # of a ratio estimator; with equal counts it is std(means) / sqrt(windows)
        means = np.array(by_window[name])
        mean = np.sum(counts * means) / counts.sum()
        return np.sqrt(len(means) / (len(means) - 1) * np.sum((counts * (means - mean)) ** 2)) / counts.sum()

    before, now, mean = np.array(before), np.array(now), np.mean(kl)
    return {
        "perplexity_stderr": np.exp(np.mean(nll)) * spread("nll"),
        "log_perplexity_ratio": np.log(np.exp(np.mean(nll)) / np.exp(np.mean(reference_nll))),
        "log_perplexity_ratio_stderr": spread("ratio"),
        "top1_stderr": spread("agree"),
        "lost": np.mean(before & ~now),
        "gained": np.mean(now & ~before),
        "perplexity": np.exp(np.mean(nll)),
        "reference_perplexity": np.exp(np.mean(reference_nll)),
        "kl_nats": mean,
        "kl_stderr": spread("kl"),
        "percentiles": np.percentile(kl, [50, 90, 95, 99, 99.9, 100]),
        "top1_agreement": np.mean(agree),
        "tokens": len(kl),
    }
