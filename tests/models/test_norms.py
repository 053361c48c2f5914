"""Normalisations told apart by what they compute."""

import pytest
import torch
from torch import Tensor, nn

from mezzotint.models.norms import NormForm, probe

WIDTH = 48


class Root(nn.Module):
    """Root mean square, gain ``w`` or ``1 + w``."""

    def __init__(self, *, plus_one: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(WIDTH, device="meta"))
        self.plus_one, self.eps = plus_one, eps

    def forward(self, x: Tensor) -> Tensor:
        normal = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return normal * (1 + self.scale) if self.plus_one else normal * self.scale


class Other(nn.Module):
    """One parameter per channel, and no normalisation."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH, device="meta"))
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "tanh":
            return torch.tanh(x) * self.weight
        if self.kind == "largest":
            return x / x.abs().amax(-1, keepdim=True) * self.weight
        if self.kind == "squared gain":
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) * self.weight.square()
        return x * self.weight


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Root(), NormForm("scale", None, False, False)),
        (Root(plus_one=True, eps=1e-5), NormForm("scale", None, True, False)),
        (nn.LayerNorm(WIDTH, device="meta"), NormForm("weight", "bias", False, True)),
        (nn.LayerNorm(WIDTH, bias=False, device="meta"), NormForm("weight", None, False, True)),
        (nn.RMSNorm(WIDTH, device="meta"), NormForm("weight", None, False, False)),
        (Other("tanh"), None),
        (Other("largest"), None),
        (Other("squared gain"), None),
        (Other("gain"), None),
        (nn.LayerNorm(WIDTH, elementwise_affine=False), None),
    ],
)
def test_form(module: nn.Module, expected: NormForm | None) -> None:
    assert probe(module) == expected
    assert {p.device.type for p in module.parameters()} <= {"meta"}
