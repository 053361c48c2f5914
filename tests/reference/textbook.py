"""Float64 twin of a whole run: sequential GPTQ of a Llama as the papers tell it. Transformers runs it, nothing of ours.

Slow on purpose: whenever inputs are needed, the whole model runs again from the tokens on.
"""

from dataclasses import dataclass

import numpy as np
import torch

# linears that share an input, in the order in which they are quantized (true-sequential)
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True)
class Grid:
    """Grid of one matrix: ``scale[row, group] * (code - zero_point[row, group])`` for codes of so many bits."""

    scale: np.ndarray
    zero_point: np.ndarray
    group_size: int
    bits: int

    def nearest(self, values, column):
        """The value nearest to each row's, in a column of the matrix."""
        scale, zero_point = self.scale[:, column // self.group_size], self.zero_point[:, column // self.group_size]
        code = np.clip(np.rint(values / scale) + zero_point, 0, 2**self.bits - 1)
        return scale * (code - zero_point)


@dataclass(frozen=True)
class Quantized:
    """What became of one matrix; ``h_error`` is ``tr(E G E') / tr(W G W')`` on the inputs that it was fitted on."""

    weight: np.ndarray
    h_error: float


def quantize(model, tokens, grids, *, damping=0.01, follow=None):
    """Quantizes a Llama of transformers in place, block by block and group by group.

    Args:
        model: in float64.
        tokens: ``[windows, seqlen]`` to calibrate on.
        grids: `Grid` of every matrix that is quantized, by name.
        damping: ridge on the Hessian over its mean diagonal.
        follow: matrices by name that later groups see in the place of the results.

    Returns:
        `Quantized` by name.
    """
    done = {}
    for block in range(len(model.model.layers)):
        for group in GROUPS:
            names = [f"model.layers.{block}.{member}" for member in group]
            # the inputs come from a model in which everything before this group is quantized already
            gram = gram_of_inputs(model, model.get_submodule(names[0]), tokens)
            steps = eliminated(gram, damping)
            for name in names:
                weight = model.get_submodule(name).weight.detach().numpy().copy()
                value = gptq(weight, steps, grids[name])
                error = value - weight
                h_error = np.trace(error @ gram @ error.T) / np.trace(weight @ gram @ weight.T)
                done[name] = Quantized(weight=value, h_error=float(h_error))
                put(model, name, value if follow is None else follow[name])
    return done


def put(model, name, value):
    """A matrix in the place of a linear's."""
    with torch.no_grad():
        model.get_submodule(name).weight.copy_(torch.from_numpy(value))


def eliminated(gram, damping):
    """Columns in the order of decreasing ``diag(H)``, each with ``V_tF / V_tt``, by an explicit inverse that shrinks.

    For the next column t and the columns F behind it, ``V`` is the inverse of the Hessian of t and F:

        V <- V - V_Ft V_tF / V_tt
    """
    n = len(gram)
    order = np.argsort(-np.diag(gram), kind="stable")
    hessian = gram + damping * np.trace(gram) / n * np.eye(n)
    inverse = np.linalg.inv(hessian[np.ix_(order, order)])
    rows = []
    for t in range(n):
        rows.append(inverse[t, t + 1 :] / inverse[t, t])
        inverse[t + 1 :, t + 1 :] -= np.outer(inverse[t + 1 :, t], rows[t])
    return order, rows


def gptq(weight, steps, grid):
    """Optimal brain quantization: ``w_F -= (w_t - q_t) V_tF / V_tt``, column t after column t."""
    order, rows = steps
    work, value = weight[:, order], np.zeros_like(weight)
    for t, row in enumerate(rows):
        value[:, order[t]] = grid.nearest(work[:, t], order[t])
        work[:, t + 1 :] -= np.outer(work[:, t] - value[:, order[t]], row)
    return value


def gram_of_inputs(model, linear, tokens):
    """``sum x x'`` over everything that goes into a linear when the model reads these tokens."""
    total = np.zeros((linear.in_features, linear.in_features))

    def add(_, args):
        x = args[0].flatten(0, -2).numpy()
        total.__iadd__(x.T @ x)

    handle = linear.register_forward_pre_hook(add)
    for windows in tokens.split(8):
        logits_of(model, windows)
    handle.remove()
    return total


def logits_of(model, windows):
    """``[windows, seqlen, vocab]``."""
    with torch.no_grad():
        return model(input_ids=windows, use_cache=False).logits


def kl_nats(original, model, tokens):
    """Mean of ``sum p (log p - log q)`` over all predictions of a next token that is in its window."""
    found = []
    for windows in tokens.split(8):
        log_p, log_q = (logits_of(each, windows)[:, :-1].log_softmax(dim=-1) for each in (original, model))
        found.append((log_p.exp() * (log_p - log_q)).sum(dim=-1).flatten())
    return float(torch.cat(found).mean())
