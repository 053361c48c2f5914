"""OneComp: GPTQ, with error propagation (QEP) and coordinate descent (LPCD), and JointQ."""

from pathlib import Path

from handover import run
from safetensors.torch import load_file

import onecomp.calibration.custom as texts  # isort: skip
import torch
from onecomp import CalibrationConfig, JointQ, LPCDConfig, ModelConfig, QEPConfig, Runner
from onecomp.quantizer.gptq import GPTQ


def quantizer(job):
    """Uniform codes in groups."""
    if job["method"] == "JointQ":
        return JointQ(bits=job["bits"], group_size=job["group_size"], **job["settings"])
    return GPTQ(wbits=job["bits"], groupsize=job["group_size"], **job["settings"])


def quantize(job, tokens):
    """Run it and save what it made. It takes text only, so the windows stand in where it would cut text."""
    texts.prepare_from_texts = lambda *_, **__: {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    placeholder = Path(job["out"]).parent / "calibration.txt"
    placeholder.write_text("The windows take the place of this line.\n")
    samples = {"num_calibration_samples": len(tokens), "max_length": tokens.shape[1]}
    runner = Runner(
        model_config=ModelConfig(path=job["model"], dtype="bfloat16", device="cpu"),
        quantizer=quantizer(job),
        calibration_config=CalibrationConfig(calibration_dataset=str(placeholder), **samples),
        qep="QEP" in job["method"] or "LPCD" in job["method"],
        qep_config=QEPConfig(device="cpu"),
        lpcd="LPCD" in job["method"],
        lpcd_config=LPCDConfig(device="cpu"),
    )
    runner.run()
    runner.save_quantized_model(job["packed"])
    return runner.quantizer.results


def unpack(job, results):
    """What its checkpoint has for each matrix; where columns are in another order, the group of each column too."""
    tensors = load_file(str(Path(job["packed"]) / "model.safetensors"))
    for name, result in results.items():
        parts = ["qweight", "scales", "qzeros"] + ["g_idx"] * bool(job["settings"].get("actorder"))
        yield f"{name}.weight", result.compute_dequantized_weight(), [tensors[f"{name}.{part}"] for part in parts]


run(quantize, unpack, ["onecomp"])
