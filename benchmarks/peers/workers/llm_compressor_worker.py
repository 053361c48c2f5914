"""llm-compressor: nearest rounding and GPTQ into its packed checkpoint, which its own reader unpacks again."""

from pathlib import Path

from handover import run
from safetensors.torch import load_file

from compressed_tensors.compressors import PackedQuantizationCompressor  # isort: skip
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from transformers import AutoModelForCausalLM


def scheme(job):
    """Weights only, in groups."""
    chosen = {"symmetric": False, "observer": job["settings"].get("observer", "memoryless_minmax")}
    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=job["bits"], type="int", strategy="group", group_size=job["group_size"], **chosen
        ),
    )


def quantize(job, tokens):
    """Run its entry point and save what it made."""
    rest = {"config_groups": {"group_0": scheme(job)}, "ignore": ["lm_head"]}
    modifier = {"RTN": QuantizationModifier, "GPTQ": GPTQModifier}[job["method"]]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    windows = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": (tokens * 0 + 1).tolist()})
    data = {"dataset": windows, "num_calibration_samples": len(tokens), "max_seq_length": tokens.shape[1]}
    oneshot(model=model, recipe=[modifier(**rest)], **({} if modifier is QuantizationModifier else data))
    model.save_pretrained(job["packed"], save_compressed=True)


def unpack(job, _):
    """Every tensor of the packed checkpoint."""
    tensors = load_file(str(Path(job["packed"]) / "model.safetensors"))
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        stem = name.removesuffix("_packed")
        parts = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{stem}_")}
        stored = [parts[key] for key in ("weight_packed", "weight_scale", "weight_zero_point")]
        yield stem, PackedQuantizationCompressor.decompress(parts, scheme(job))["weight"], stored


run(quantize, unpack, ["llmcompressor", "compressed-tensors"])
