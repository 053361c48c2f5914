"""Low-rank compensations of a run, written as a PEFT adapter beside the model."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mezzotint.storage.files import replaced, write_json
from mezzotint.storage.saved import Saved
from mezzotint.submodules.lora import Factors, Lora
from mezzotint.sweep.solve import Solved, trusted

FOLDER = "adapter"
NAMES = (f"{FOLDER}/adapter_config.json", f"{FOLDER}/adapter_model.safetensors")
_STORED = torch.bfloat16
_PREFIX = "base_model.model."


class Adapter:
    """Collects the compensations of matrices.

    Args:
        settings: of the compensation.
        saved: what `named` gave in an earlier process.
    """

    def __init__(self, settings: Lora, saved: Saved | None = None) -> None:
        self._settings = settings
        self._tensors: dict[str, Tensor] = {} if saved is None else {name: saved.read(name) for name in saved.names}
        ends = _PREFIX, ".lora_A.weight"
        self._modules = [name[len(ends[0]) : -len(ends[1])] for name in self._tensors if name.endswith(ends[1])]

    def named(self) -> Iterable[tuple[str, Tensor]]:
        """All factors so far, for ``saved``."""
        return self._tensors.items()

    def compensated(self, solved: Solved) -> Tensor:
        """The dense values of a quantized matrix with its compensation, as both will run together."""
        fit, _ = trusted(solved.matrix, solved.known.fit)
        assert fit is not None
        factors = self._settings.factors(solved.weight.to(solved.value.dtype), solved.value, fit)
        stored = Factors(*(part.to(_STORED) for part in factors))
        module = solved.matrix.parameter.rpartition(".")[0]
        self._modules.append(module)
        for name, part in (("lora_A", stored.down), ("lora_B", stored.up)):
            self._tensors[f"{_PREFIX}{module}.{name}.weight"] = part.contiguous().cpu()
        return solved.value + Factors(*(part.to(solved.value) for part in stored)).change

    def write(self, folder: Path, base: str) -> None:
        """Write `NAMES` into the output folder."""
        folder = folder / FOLDER
        folder.mkdir(exist_ok=True)  # of a process that was killed behind this
        with replaced(folder / "adapter_model.safetensors") as temporary:
            save_file(self._tensors, temporary, metadata={"format": "pt"})
        ranks = {module: self._tensors[f"{_PREFIX}{module}.lora_A.weight"].shape[0] for module in self._modules}
        rank = max(ranks.values())
        write_json(
            folder / "adapter_config.json",
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": base,
                "r": rank,
                "lora_alpha": rank,  # PEFT scales by alpha over rank
                "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
                "alpha_pattern": {module: r for module, r in ranks.items() if r != rank},
                "target_modules": self._modules,
                "bias": "none",
                "lora_dropout": 0.0,
                "fan_in_fan_out": False,
                "inference_mode": True,
            },
        )
