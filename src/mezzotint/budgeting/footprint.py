"""How large a folder will be, file by file, before anything is written."""

import json

from mezzotint.core.dtypes import SAFETENSORS_NAMES
from mezzotint.formats.companions import companions
from mezzotint.formats.gguf.format import Gguf, kept_bytes
from mezzotint.models import Source
from mezzotint.planning.planned import Planned

# mezzotint.json and README.md: the frame with a frontier, and what each matrix adds (measured: 25 kB, 1230)
_REPORT = 29_000
_REPORT_MATRIX = 1350
_PIECE = 2048  # of a prompt, that engines run at once


def other_bytes(source: Source, planned: Planned) -> int:
    """Everything in the folder but the tensors of the quantized matrices; of a GGUF file no more than this."""
    layout, config = planned.layout, source.folder / "config.json"
    quantization = planned.form.config(planned.plan, source.map)
    names = companions(source.folder, trusted=planned.request.trust_remote_code)
    files = [(source.folder / name).stat().st_size for name in names]
    if isinstance(planned.form, Gguf):
        beside = kept_bytes(source.folder, source.config.to_dict(), layout.specs)
    else:
        beside = layout.nbytes - quantized_bytes(source, planned) + _header_bytes(planned)
    return (
        beside
        + config.stat().st_size
        + (0 if quantization is None else len(json.dumps({"quantization_config": dict(quantization)}, indent=2)))
        + sum(files)
        + _REPORT
        + _REPORT_MATRIX * len(planned.plan.entries)
    )


def serving_bytes(source: Source, context: int) -> int:
    """Memory beside the weights for one sequence of so many tokens: keys and values, activations, logits.

    In bfloat16, as engines do it that cache keys and values of every head and run prompts in pieces of 2048 tokens.
    Layers with a sliding window keep that many tokens; recurrent layers keep nothing that grows.
    """
    config = source.config.get_text_config()
    heads = config.num_attention_heads
    per_layer = (
        2
        * 2
        * (getattr(config, "num_key_value_heads", None) or heads)
        * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    )
    window = min(getattr(config, "sliding_window", None) or context, context)
    kept = {"full_attention": context, "sliding_attention": window, "chunked_attention": window}
    layers = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    cache = per_layer * sum(kept.get(layer, 0) for layer in layers)
    widest = max(matrix.shape[0] for matrix in source.map.matrices.values() if matrix.name != source.map.head)
    piece = min(context, _PIECE)
    return cache + 2 * piece * (2 * source.map.stream_width + 3 * widest) + 4 * config.vocab_size


def quantized_bytes(source: Source, planned: Planned) -> int:
    """The tensors of the quantized matrices that are written by themselves."""
    found = 0
    kept = {spec.name for spec in planned.layout.specs}
    for entry in planned.plan.entries:
        matrix = source.map.matrices[entry.matrix]
        dtype = source.checkpoint.tensors[matrix.sources[0]].dtype
        specs = planned.form.specs(matrix, entry.grid, dtype, entry.basis)
        found += sum(spec.nbytes for spec in specs if spec.name in kept)
    return found


def _header_bytes(planned: Planned) -> int:
    """Of the safetensors files: names, dtypes, shapes and places; and the checksums beside them."""
    entries = {
        spec.name: {"dtype": SAFETENSORS_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": (10**9, 10**9)}
        for spec in planned.layout.specs
    }
    checksums = {spec.name: "0" * 8 for spec in planned.layout.specs}  # in a file of their own
    return len(json.dumps(entries, separators=(",", ":"))) + len(json.dumps(checksums, indent=2))
