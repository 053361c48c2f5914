"""What can be chosen by name: one line each, imported on first use."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from mezzotint.errors import ConfigError, unknown


class Registry(Mapping[str, Any]):
    """Names to objects given as ``"package.module:attribute"``; the module is imported when the name is first used."""

    def __init__(self, what: str, entries: Mapping[str, str]) -> None:
        self.what = what
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Any:
        if name not in self._entries:
            raise ConfigError(unknown(self.what, name, self._entries))
        module, attribute = self._entries[name].split(":")
        return getattr(import_module(module), attribute)

    def add(self, name: str, place: str) -> None:
        """Make something of one's own known by a name.

        Args:
            name: not taken yet.
            place: ``"package.module:attribute"``; in a script ``f"{__name__}:attribute"``.

        Raises:
            ConfigError: the name is taken.
        """
        if self._entries.get(name, place) != place:
            raise ConfigError(f"{self.what} {name!r} exists: {self._entries[name]}. Choose another name.")
        self._entries[name] = place

    def __contains__(self, name: object) -> bool:
        # Mapping would look the name up: import the module, and raise for an unknown name
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


TARGETS = Registry(
    "target",
    {
        "weight": "mezzotint.targets.weight:WeightTarget",
        "qep": "mezzotint.targets.qep:Qep",
        "loaq": "mezzotint.targets.loaq:Loaq",
    },
)
TRANSFORMS = Registry(
    "transform",
    {
        "awq": "mezzotint.transforms.awq:Awq",
        "hadamard": "mezzotint.transforms.hadamard:Hadamard",
        "quip": "mezzotint.transforms.incoherence:Quip",
    },
)
GRIDS = Registry(
    "grid",
    {
        "uniform": "mezzotint.grids.uniform:UniformGrid",
        "lookup": "mezzotint.grids.lookup:LookupGrid",
        "vector": "mezzotint.grids.vector:VectorGrid",
        "trellis": "mezzotint.grids.trellis:TrellisGrid",
        "gguf": "mezzotint.grids.gguf.grid:GgufGrid",
    },
)
ROUNDINGS = Registry(
    "rounding",
    {
        "nearest": "mezzotint.rounding.nearest:Nearest",
        "gptq": "mezzotint.rounding.gptq:Gptq",
        "gptaq": "mezzotint.rounding.gptaq:Gptaq",
        "qronos": "mezzotint.rounding.qronos:Qronos",
    },
)
ALLOCATIONS = Registry("allocation", {"knapsack": "mezzotint.allocation.knapsack:Knapsack"})
CURVATURES = Registry("curvature", {"fisher": "mezzotint.core.curvature:Fisher"})
REFINEMENTS = Registry("refinement", {"descent": "mezzotint.rounding.refine:Descent"})
SUBMODULES = Registry("submodules", {"lpcd": "mezzotint.submodules.lpcd:Lpcd"})
COMPENSATIONS = Registry("compensation", {"lora": "mezzotint.submodules.lora:Lora"})
FORMATS = Registry(
    "format",
    {
        "compressed-tensors": "mezzotint.formats.compressed_tensors:CompressedTensors",
        "gptq": "mezzotint.formats.gptq:Gptq",
        "gptq-v2": "mezzotint.formats.gptq:GptqV2",
        "mezzotint": "mezzotint.formats.native:Native",
        "exl3": "mezzotint.formats.exl3:Exl3",
        "dense": "mezzotint.formats.dense:Dense",
        "gguf": "mezzotint.formats.gguf.format:Gguf",
    },
)
