"""What the workers share. It runs inside a peer's environment: torch, numpy and safetensors, nothing of ours."""

import json
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from shutil import copyfile

import numpy as np
import torch
from safetensors.torch import load_file, save_file

BESIDE = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def peak_rss_bytes():
    """Largest resident memory of this process so far, mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def processor_seconds():
    """Of this process and of those it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def stored_bits(tensors):
    """Bits that tensors take as they are stored, their padding included."""
    return sum(8 * tensor.numel() * tensor.element_size() for tensor in tensors)


def write_dense(model, matrices, out):
    """The folder of the original with these matrices in place of its own, in its dtype.

    ``matrices`` is ``{name of the tensor: values}``. A name that the original lacks and another shape are errors.
    """
    tensors = load_file(str(Path(model) / "model.safetensors"))
    for name, values in matrices.items():
        if name not in tensors or tensors[name].shape != values.shape:
            here = tuple(tensors[name].shape) if name in tensors else "no such tensor"
            raise ValueError(f"{name}: {tuple(values.shape)} handed over, the original has {here}")
        if not torch.isfinite(values).all():
            raise ValueError(f"{name}: not all values are finite")
        tensors[name] = values.detach().to(tensors[name].dtype).contiguous()
    out = Path(out)
    out.mkdir(parents=True)
    save_file(tensors, str(out / "model.safetensors"), metadata={"format": "pt"})
    for name in BESIDE:
        if (Path(model) / name).exists():
            copyfile(Path(model) / name, out / name)


def run(quantize, unpack, packages):
    """Read the job named on the command line, time ``quantize`` and hand over what ``unpack`` finds.

    ``quantize(job, tokens)`` reads the model and chooses all codes; only it is timed. ``unpack(job, made)`` gives for
    each matrix its name, its values, and the tensors that the peer stores for it: codes, scales, zero points.
    """
    job = json.loads(Path(sys.argv[1]).read_text())
    tokens = torch.from_numpy(np.load(job["tokens"]))  # [windows, seqlen], int64
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (job["limit_seconds"], job["limit_seconds"] + 5))  # ended by SIGXCPU
    started, used = time.perf_counter(), processor_seconds()
    made = quantize(job, tokens)
    result = {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": processor_seconds() - used,
        "peak_rss_bytes": peak_rss_bytes(),
    }
    matrices, bits, weights = {}, 0, 0
    for name, values, stored in unpack(job, made):
        matrices[name] = values
        bits += stored_bits(stored)
        weights += values.numel()
    write_dense(job["model"], matrices, job["out"])
    result |= {"bits_per_weight": bits / weights, "weights": weights}
    result["versions"] = {name: version(name) for name in ("torch", "transformers", *packages)}
    print(f"RESULT {json.dumps(result)}")
