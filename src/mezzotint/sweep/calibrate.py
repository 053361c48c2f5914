"""Calibration windows for a plan: from text, a data set, or sampled from the model itself."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from mezzotint.blockwise.streams import Streams
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
from mezzotint.core.plans import CalibrationPlan, Entry
from mezzotint.errors import ConfigError
from mezzotint.models import Source
from mezzotint.models.skeleton import quiet
from mezzotint.planning.costs import SAMPLING_BYTES
from mezzotint.planning.planned import Planned
from mezzotint.process.ranks import ALONE, Ranks
from mezzotint.recipes.request import Request
from mezzotint.storage.saved import Saved

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


def calibrated_streams(
    source: Source,
    planned: Planned,
    entries: Sequence[Entry],
    windows: Windows,
    folder: Path,
    *,
    saved: Saved | None = None,
    ranks: Ranks = ALONE,
) -> Streams:
    """The two streams on the windows of a plan, for these of its entries.

    Args:
        source: the original.
        planned: its calibration must not be None.
        entries: what will ask for statistics.
        windows: `calibration_windows` of the plan.
        folder: where activations spill to.
        saved: hidden states of an interrupted run.
        ranks: that share the windows.
    """
    request = planned.request
    fit, held_out = windows.split(seed=request.seed)
    return Streams(
        source,
        fit,
        held_out,
        original_fit=any(entry.needs & {"drift", "residual"} for entry in entries),
        folder=folder,
        stream_bytes=planned.costs.stream_bytes,
        keep_runs=planned.costs.keep_runs,
        panels=planned.costs.panels,
        device=request.device,
        precision=planned.precision,
        saved=saved,
        ranks=ranks,
    )


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
