"""Settings of layer-projected coordinate descent."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from mezzotint.errors import ConfigError
from mezzotint.submodules.relax import Search, Sums
from mezzotint.submodules.scores import Metric

Part = Literal["qk", "vo", "updown"]
PARTS: tuple[Part, ...] = ("qk", "vo", "updown")
MEMBERS: dict[Part, tuple[str, ...]] = {"qk": ("q", "k"), "vo": ("v", "o"), "updown": ("up", "down")}
# what the members of a part are weighed by, beside its members themselves
AROUND: dict[Part, tuple[str, ...]] = {"qk": (), "vo": ("q", "k"), "updown": ()}
# that a relaxed problem is made of; with attention in it every token meets many others, which costs and says more
_LEAST_TOKENS: dict[Part, float] = {"qk": 768.0, "vo": 768.0, "updown": 4096.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lpcd:
    """Settings of LPCD (arXiv 2512.01546): relax each member of a submodule, project it, keep it if that helps.

    Attributes:
        parts: submodules that are optimised: ``qk``, ``vo``, ``updown``; what each gains is in docs/submodules.md.
        strength: of each member's change, from 0 (the original weight is aimed at) to 1 (the relaxed one).
        damping: ridge towards the original weight, as a fraction of the mean diagonal of the gram.
        iterations: of conjugate gradients for each member without a closed form.
        sweeps: how often the members of a submodule take their turn.
        tokens: per column of a member that a relaxed problem with attention is made of and judged on, in whole windows;
            no fewer than 768 in all, and no limit if None.
        mlp_tokens: the same for ``updown``, where every token meets itself only; no fewer than 4096.
        metric: of scores: ``plain`` as in the paper, or ``attention``, what attention loses in nats to second order.
    """

    kind: ClassVar[str] = "lpcd"
    parts: tuple[Part, ...] = PARTS
    strength: float = 0.75
    damping: float = 0.3
    iterations: int = 3
    sweeps: int = 1
    tokens: float | None = 4.0
    mlp_tokens: float | None = 4.0
    metric: Metric = "attention"
    needs: ClassVar[frozenset[str]] = frozenset({"gram", "drift", "residual"})

    def __post_init__(self) -> None:
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise ConfigError(f"submodules.parts is {list(self.parts)}; name each of {', '.join(PARTS)} at most once.")
        limits = (
            ("strength", self.strength, 0, 1),
            ("damping", self.damping, 0, 100),
            ("iterations", self.iterations, 1, 100),
            ("sweeps", self.sweeps, 1, 10),
            ("tokens", 1.0 if self.tokens is None else self.tokens, 0.1, 1e6),
            ("mlp_tokens", 1.0 if self.mlp_tokens is None else self.mlp_tokens, 0.1, 1e6),
        )
        for name, value, least, most in limits:
            if not least <= value <= most:
                raise ConfigError(f"submodules.{name} is {value}; it must be from {least} to {most}.")

    def tokens_of(self, part: Part, width: int) -> float:
        """How many tokens the problems of a part are made of, whose members have so many columns."""
        each = self.mlp_tokens if part == "updown" else self.tokens
        return math.inf if each is None else max(each * width, _LEAST_TOKENS[part])

    def search(self, sums: Sums) -> Search:
        """Of the relaxed problems, whose batches the processes behind ``sums`` share."""
        return Search(damping=self.damping, iterations=self.iterations, sums=sums)
