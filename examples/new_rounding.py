"""A rounding of one's own: cyclic coordinate descent, as in QuantEase (arXiv 2309.01885).

From nearest codes on, each column in turn takes the best codes given all others. With errors ``E = W - V`` and the
inputs' second moments ``H``, the best value of column ``j`` before rounding is ``V[:, j] + E H[:, j] / H[j, j]``.

    python examples/new_rounding.py MODEL CALIBRATION.txt OTHER.txt OUT
"""

import sys
from dataclasses import dataclass
from typing import ClassVar

import torch

import mezzotint
from mezzotint.core.contracts import Aim, FittedGrid, Rounded
from mezzotint.core.statistics import Statistics
from mezzotint.registry import ROUNDINGS


@dataclass(frozen=True, slots=True, kw_only=True)
class Cyclic:
    """Settings are fields: ``--set rounding.sweeps=3`` reaches this one."""

    kind: ClassVar[str] = "cyclic"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})  # what must be collected: the inputs' second moments
    accepts_corrected: ClassVar[bool] = True  # serves corrected targets (QEP, LoaQ) as well
    scalar_only: ClassVar[bool] = True  # codes single weights, not pairs or tiles
    sweeps: int = 1
    damping: float = 0.01

    def round(self, aim: Aim, grid: FittedGrid, fit: Statistics) -> Rounded:
        """Codes for ``aim.matrix`` ``[out, in]``."""
        weight, code = aim.matrix, grid.encode(aim.matrix)
        value = grid.decode(code)
        gram = fit.gram.to(weight.dtype)
        gram = gram + self.damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        for _ in range(self.sweeps):
            for j in range(weight.shape[1]):
                best = value[:, j] + (weight - value) @ gram[:, j] / gram[j, j]
                value[:, j] = grid.encode_(code, best[:, None], torch.tensor([j]))[:, 0]
        return Rounded(code=code, grid=grid, value=value)


if __name__ == "__main__":
    model, calibration, other, out = sys.argv[1:]
    ROUNDINGS.add("cyclic", f"{__name__}:Cyclic")
    for kind in ("nearest", "cyclic", "gptq"):
        recipe = mezzotint.Recipe(name=kind, grid={"kind": "uniform", "range": "error"}, rounding={"kind": kind})
        options = {"bits": 3, "settings": {"grid.group_size": None}, "calibration": calibration}
        mezzotint.quantize(model, recipe, out=f"{out}-{kind}", samples=32, seqlen=128, **options)
        result = mezzotint.evaluate(f"{out}-{kind}", other, against=model, seqlen=64, windows=8)
        print(f"{kind:10} KL {result.kl_nats:.4f}")
