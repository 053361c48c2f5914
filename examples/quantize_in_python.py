"""Quantize a model, see what it lost, and use it: everything from Python.

python examples/quantize_in_python.py MODEL CALIBRATION.txt OTHER.txt OUT
"""

import sys

import torch
from transformers import AutoTokenizer

import mezzotint

model, calibration, other, out = sys.argv[1:]

# What would be done, before anything is read: one entry a matrix, sizes, memory.
planned = mezzotint.plan(model, "gptq", bits=4, calibration=calibration, samples=32, seqlen=128)
print(
    f"{len(planned.plan.entries)} matrices, {planned.bits_per_weight:.2f} bits a weight, format {planned.plan.format}"
)

report = mezzotint.quantize(model, "gptq", out=out, bits=4, calibration=calibration, samples=32, seqlen=128)
worst = max(report["linears"], key=lambda linear: linear["h_error_held_out"])
print(f"{report['seconds']:.1f} s; most was lost in {worst['name']}: {worst['h_error_held_out']:.2%} on held-out text")

# Text that calibration did not see. KL says how far the model's predictions moved; perplexity alone can hide it.
result = mezzotint.evaluate(out, other, against=model, seqlen=64, windows=8)
print(f"perplexity {result.reference_perplexity:.2f} -> {result.perplexity:.2f}")
print(f"KL {result.kl_nats:.4f} ± {result.kl_stderr:.4f} nats per token, half of the tokens below ", end="")
print(f"{result.kl_percentiles['p50']:.4f}, one in a hundred above {result.kl_percentiles['p99']:.4f}")

# An ordinary model of transformers.
quantized, tokenizer = mezzotint.load(out), AutoTokenizer.from_pretrained(out)
with torch.no_grad():
    tokens = quantized.generate(**tokenizer("The wheel", return_tensors="pt"), max_new_tokens=12, do_sample=False)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
