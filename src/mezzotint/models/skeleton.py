"""Models without weights: the modules of an architecture, filled block by block and emptied again."""

import contextlib
import copy
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from mezzotint.errors import ModelError
from mezzotint.models import experts
from mezzotint.models.binding import BoundCheckpoint
from mezzotint.models.checkpoint import check_folder


def load_config(folder: Path | str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a model folder (or of a name on the hub, where the folder does not exist).

    Raises:
        ModelError: there is none, or its architecture is unknown or needs code from the folder.
    """
    root = Path(folder)
    if root.exists():
        check_folder(root)
        if not (root / "config.json").is_file():
            raise ModelError(
                f"model folder {str(root)!r} has no config.json. Copy it from where the weights came from."
            )
    try:
        with quiet():
            return AutoConfig.from_pretrained(
                str(folder), trust_remote_code=trust_remote_code, local_files_only=root.exists()
            )
    except (ValueError, OSError, KeyError, ImportError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ModelError(_config_error(root, error)) from error


def build_skeleton(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of ``config`` in evaluation mode: parameters on ``meta``, buffers real, in float32, without a cache.

    Its configuration is a copy. Experts stored as 3-D parameters run through ``mezzotint.models.experts``.

    Raises:
        ModelError: transformers has no causal language model for this configuration.
    """
    own = copy.deepcopy(config)
    try:
        with quiet(), no_init_weights(), _parameters_on_meta():
            skeleton = AutoModelForCausalLM.from_config(own, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, ImportError, AttributeError, TypeError, RuntimeError) as error:
        raise ModelError(
            f"model type {config.model_type!r} cannot be built as a causal language model "
            f"({type(error).__name__}: {_briefly(error)}). Give a text model, or the text part of this one."
        ) from error
    skeleton.tie_weights()
    skeleton.eval().requires_grad_(False)
    for part in (skeleton.config, skeleton.config.get_text_config()):
        part.use_cache = False
        if hasattr(part, "rescale_every"):
            part.rescale_every = 0  # RWKV halves weights and states every few blocks, for float16's range alone
    experts.install(skeleton)
    return skeleton


def materialize(
    module: nn.Module,
    prefix: str,
    checkpoint: BoundCheckpoint,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    recurse: bool = True,
) -> None:
    """Load the parameters and persistent buffers of ``module`` and move its other buffers to ``device``.

    Args:
        module: a part of the skeleton that ``checkpoint`` is bound to, or all of it.
        prefix: its name in the skeleton, "" for all of it.
        checkpoint: gives the values.
        dtype: of floating-point parameters; None keeps the checkpoint's. Parameters that the architecture keeps in
            float32 stay so; integers, booleans and buffers keep their dtype.
        device: where everything goes.
        recurse: with all modules in it; otherwise only what is its own.
    """
    dot = f"{prefix}." if prefix else ""
    wide = _kept_wide(checkpoint.skeleton, dtype)
    loaded: dict[int, nn.Parameter] = {}
    for name, parameter in list(module.named_parameters(recurse=recurse, remove_duplicate=False)):
        if id(parameter) not in loaded:
            value = checkpoint.parameter(dot + name).to(device)
            if dtype is not None and value.is_floating_point():
                value = value.to(torch.float32 if wide(dot + name) else dtype)
            loaded[id(parameter)] = nn.Parameter(value, requires_grad=False)
        _assign(module, name, loaded[id(parameter)])
    persistent = set(module.state_dict())
    for name, buffer in list(module.named_buffers(recurse=recurse, remove_duplicate=False)):
        value = checkpoint.parameter(dot + name) if name in persistent and checkpoint.holds(dot + name) else buffer
        _assign(module, name, value.to(device=device, dtype=buffer.dtype))


def dematerialize(module: nn.Module, *, recurse: bool = True) -> None:
    """Give the memory of the parameters of ``module`` back: they are on ``meta`` again. Buffers stay."""
    emptied: dict[int, nn.Parameter] = {}
    for name, parameter in list(module.named_parameters(recurse=recurse, remove_duplicate=False)):
        if parameter.device.type != "meta" and id(parameter) not in emptied:
            emptied[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        _assign(module, name, emptied.get(id(parameter), parameter))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' logs and progress bars for a while."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter that a module registers goes to ``meta``.

    Building on ``meta`` altogether would leave buffers without values, and only some architectures can recompute them.
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=False)
        original(module, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(path), attribute, value)


def _kept_wide(skeleton: PreTrainedModel, dtype: torch.dtype | None) -> Callable[[str], bool]:
    """Whether the architecture keeps a parameter in float32 when the rest is in ``dtype``."""
    globs: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        globs |= set(skeleton._keep_in_fp32_modules_strict or ())  # noqa: SLF001 (no public name)
    if dtype == torch.float16:
        globs |= set(skeleton._keep_in_fp32_modules or ())  # noqa: SLF001 (no public name)
    if not globs:
        return lambda _: False
    pattern = re.compile("|".join(glob.replace("*", ".*") for glob in sorted(globs)))
    return lambda name: pattern.search(name) is not None


def _config_error(root: Path, error: Exception) -> str:
    if not root.exists():
        return (
            f"model {str(root)!r} is neither a folder nor a model that the hub can give ({_briefly(error)}). "
            "Give the folder that holds config.json and model.safetensors."
        )
    try:
        written = json.loads((root / "config.json").read_text(encoding="utf-8"))
    except ValueError as broken:
        return f"config.json of {str(root)!r} is not valid JSON ({broken}). Download it again."
    model_type = written.get("model_type") if isinstance(written, dict) else None
    if model_type is None:
        return f"config.json of {str(root)!r} has no model_type. Use the config.json that belongs to the weights."
    if "auto_map" in written:
        return (
            f"model type {model_type!r} of {str(root)!r} needs Python code from its folder. Read that code, and if you "
            "trust it, allow it with trust_remote_code."
        )
    return (
        f"model type {model_type!r} of {str(root)!r} cannot be configured by transformers {transformers.__version__} "
        f"({_briefly(error)}). Update transformers, or check config.json."
    )


def _briefly(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]} ..."
