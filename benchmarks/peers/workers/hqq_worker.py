"""HQQ: half-quadratic ranges and nearest rounding of weights, without calibration."""

from handover import run

import torch  # isort: skip
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq.models.hf.base import AutoHQQHFModel
from transformers import AutoModelForCausalLM


def quantize(job, _):
    """Its own entry point leaves the head alone."""
    config = BaseQuantizeConfig(nbits=job["bits"], group_size=job["group_size"], **job["settings"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16)
    AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.bfloat16, device="cpu")
    return model


def unpack(_, model):
    """Codes as it packs them, real scales and zero points."""
    for name, module in model.named_modules():
        if isinstance(module, HQQLinear):
            yield f"{name}.weight", module.dequantize(), [module.W_q, module.meta["scale"], module.meta["zero"]]


run(quantize, unpack, ["hqq"])
