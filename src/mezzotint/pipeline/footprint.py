"""How large a folder will be, file by file, before anything is written."""

import json

from mezzotint.core.dtypes import SAFETENSORS_NAMES
from mezzotint.formats.folder import companions
from mezzotint.models import Source
from mezzotint.pipeline.plan import Planned

# mezzotint.json: its frame with a frontier, and what each matrix adds to it (measured: 21 kB, 1180 to 1230)
_REPORT = 24_000
_REPORT_MATRIX = 1250


def other_bytes(source: Source, planned: Planned) -> int:
    """Everything in the folder but the tensors of the quantized matrices."""
    layout, config = planned.layout, source.folder / "config.json"
    quantization = planned.form.config(planned.plan, source.map)
    files = [path.stat().st_size for path in companions(source.folder, trusted=planned.request.trust_remote_code)]
    return (
        layout.nbytes
        - quantized_bytes(source, planned)
        + _header_bytes(planned)
        + config.stat().st_size
        + (0 if quantization is None else len(json.dumps({"quantization_config": dict(quantization)}, indent=2)))
        + sum(files)
        + _REPORT
        + _REPORT_MATRIX * len(planned.plan.entries)
    )


def quantized_bytes(source: Source, planned: Planned) -> int:
    """The tensors of the quantized matrices that are written by themselves."""
    found = 0
    kept = {spec.name for spec in planned.layout.specs}
    for entry in planned.plan.entries:
        matrix = source.map.matrices[entry.matrix]
        dtype = source.checkpoint.tensors[matrix.sources[0]].dtype
        specs = planned.form.specs(matrix, entry.grid, dtype, entry.transform)
        found += sum(spec.nbytes for spec in specs if spec.name in kept)
    return found


def _header_bytes(planned: Planned) -> int:
    """Of the safetensors files: names, dtypes, shapes and places."""
    entries = {
        spec.name: {"dtype": SAFETENSORS_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": (10**9, 10**9)}
        for spec in planned.layout.specs
    }
    return len(json.dumps(entries, separators=(",", ":")))
