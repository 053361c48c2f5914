"""What a bug report has to tell about a machine and what is installed on it. Nothing that is missing is an error."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mezzotint.process import machine

PACKAGES = (
    "mezzotint", "torch", "transformers", "safetensors", "compressed-tensors", "gguf", "tokenizers", "huggingface_hub",
    "numpy", "scipy", "pydantic", "typer", "greenlet", "accelerate", "datasets", "pyarrow", "matplotlib", "lm_eval",
)  # fmt: skip
# engines: the module that they are imported as, and the package that has it
ENGINES = {
    "vllm": "vllm",
    "sglang": "sglang",
    "gptqmodel": "gptqmodel",
    "llama_cpp": "llama_cpp_python",
    "exllamav3": "exllamav3",
    "optimum": "optimum",
}
# variables that change results or speed; none that could hold a secret
VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_CBWR", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA",
    "CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "RANK", "HF_HUB_OFFLINE", "MEZZOTINT_VLLM",
)  # fmt: skip
NO_KERNELS = "the compiled kernels cannot be loaded; without them nothing can be quantized. Install mezzotint again."


def examine() -> dict[str, Any]:
    """Versions, system, processor, kernels, memory, disk, GPUs, engines and environment variables.

    What is not installed is None; what cannot be found out is None or a sentence that says why.
    """
    kernels = _kernels()
    return {
        "versions": {"Python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "system": {"platform": platform.platform(), "python": f"{sys.implementation.name}, {platform.machine()}"},
        "processor": _processor(),
        "kernels": kernels,
        "memory": {
            "total_bytes": machine.total_memory_bytes(),
            "available_bytes": machine.available_memory_bytes(),
            "limit_bytes": machine.memory_limit_bytes(),
        },
        "disk": _disk(),
        "gpus": _gpus(),
        "engines": {module: _version(name) or _found(module) for module, name in ENGINES.items()},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "warnings": [] if kernels["loaded"] else [NO_KERNELS],
    }


def _version(package: str) -> str | None:
    """Of an installed package, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _found(module: str) -> str | None:
    """Some builds of an engine have a package of another name: then only the module is found."""
    return None if find_spec(module) is None else "version unknown"


def _processor() -> dict[str, Any]:
    found: dict[str, Any] = {"model": machine.processor_name(), "cores": os.cpu_count()}
    found |= {"usable_cores": machine.usable_cores(), "threads": None, "torch_capability": None}
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of it is missing
        return found | {"torch_capability": _first_line(error)}
    return found | {
        "threads": torch.get_num_threads(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _kernels() -> dict[str, Any]:
    """Which build of the compiled kernels this processor runs; the torch versions serve other devices."""
    try:
        from mezzotint import kernels
        from mezzotint.kernels import _native
    except (ImportError, OSError) as error:
        return {"loaded": False, "error": _first_line(error)}
    return {
        "loaded": True,
        "used": kernels.available_levels()[-1],
        "available": list(kernels.available_levels()),
        "products": kernels.product_levels()[-1],
        "multiplies_bfloat16": kernels.multiplies_bfloat16(),
        "file": Path(_native.__file__).name,
    }


def _disk() -> dict[str, Any]:
    """Free bytes of the folders that runs write to: the current one, our cache, and the hub's."""
    folders = {"current folder": Path(), "cache": machine.cache_folder()}
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        pass  # then nothing is downloaded either
    else:
        folders["hub cache"] = Path(HF_HUB_CACHE)
    return {name: {"free_bytes": machine.free_disk_bytes(path)} for name, path in folders.items()}


def _gpus() -> list[dict[str, Any]]:
    try:
        import torch
    except (ImportError, OSError):
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        try:
            about = torch.cuda.get_device_properties(index)
        except RuntimeError as error:  # the driver does not fit, or the device is taken
            found.append({"name": None, "error": _first_line(error)})
            continue
        capability = f"{about.major}.{about.minor}"
        found.append({"name": about.name, "memory_bytes": about.total_memory, "capability": capability})
    if torch.backends.mps.is_available():
        found.append({"name": "Apple GPU (mps); mezzotint does not use it"})
    return found


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
