"""Calibration windows for a plan: from text, a data set, or sampled from the model itself."""

from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM

from mezzotint.calibration import (
    Windows,
    check_vocabulary,
    document_windows,
    load_tokenizer,
    packed_windows,
    read_documents,
    sample_windows,
    separator_token,
)
from mezzotint.core.plans import CalibrationPlan
from mezzotint.errors import ConfigError
from mezzotint.models import Source
from mezzotint.models.skeleton import quiet
from mezzotint.planning.costs import SAMPLING_BYTES
from mezzotint.recipes.request import Request

_SELF_BATCH = 64


def calibration_windows(
    source: Source, plan: CalibrationPlan, request: Request, progress: Callable[[int, int], None]
) -> Windows:
    """The windows that the plan asks for.

    Raises:
        CalibrationError: the text is missing, unreadable or too short, or the tokenizer does not fit the model.
        ConfigError: the model is too large to sample from within ``--memory``.
    """
    tokenizer = load_tokenizer(source.folder, trust_remote_code=request.trust_remote_code)
    check_vocabulary(tokenizer, source.config)
    asked = request.calibration
    if plan.source == "self":
        return _sampled(source, plan, request, progress, start_token=separator_token(tokenizer))
    documents = read_documents(plan.source, tokenizer=tokenizer, field=asked.field, lines=asked.lines)
    build = packed_windows if asked.packing else document_windows
    windows = build(
        documents, tokenizer, samples=plan.samples, seqlen=plan.seqlen, seed=request.seed, source=plan.source
    )
    windows.check_vocabulary(source.config)
    return windows


def _sampled(
    source: Source,
    plan: CalibrationPlan,
    request: Request,
    progress: Callable[[int, int], None],
    *,
    start_token: int | None,
) -> Windows:
    weights = sum(tensor.nbytes for tensor in source.checkpoint.tensors.values())
    if request.memory is not None and weights * SAMPLING_BYTES > request.memory:
        raise ConfigError(
            f"sampling calibration text from the model takes about {weights * SAMPLING_BYTES / 2**30:.1f} GiB, more "
            f"than --memory ({request.memory / 2**30:.1f} GiB). Give text with --calibration FILE."
        )
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            str(source.folder), dtype="auto", trust_remote_code=request.trust_remote_code
        )
    torch.nn.Module.to(model.eval(), request.device)
    with torch.no_grad():
        return sample_windows(
            model,
            samples=plan.samples,
            seqlen=plan.seqlen,
            seed=request.seed,
            batch_size=_SELF_BATCH,
            start_token=start_token,
            progress=progress,
        )
