"""Perplexity, and divergence from a reference model, block by block through both models."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mezzotint.blockwise.batches import Batch, batches_of
from mezzotint.blockwise.bypass import Bypass, Passage, surroundings
from mezzotint.blockwise.source import open_source
from mezzotint.calibration import Windows, check_vocabulary, consecutive_windows, load_tokenizer, read_text
from mezzotint.calibration.hub import EVALUATED
from mezzotint.core.metrics import chunks
from mezzotint.core.precision import PRECISIONS, products_in
from mezzotint.errors import CalibrationError, ConfigError, NonFiniteError, WriteError, unknown
from mezzotint.evaluation import Divergence, Evaluation
from mezzotint.models import Source, dematerialize, materialize
from mezzotint.storage.stores import Budget, Shelf, Store

DEFAULT_SEQLEN = 2048


def evaluate(
    model: Path,
    text: str,
    *,
    against: Path | None = None,
    seqlen: int | None = None,
    windows: int | None = None,
    device: str = "cpu",
    memory: int | None = None,
    cache: Path | None = None,
    precision: str = "float32",
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Evaluation:
    """Perplexity of a folder on a text, and its divergence from the original.

    The whole text is tokenized once and cut into windows that do not overlap; the last partial one is dropped. Only one
    block of one model is in memory at a time, and logits of one chunk of positions.

    Args:
        model: folder, quantized or not.
        text: a file, or a data set by name.
        against: the reference, usually the original.
        seqlen: tokens per window; None is 2048 or what the model takes, if that is less.
        windows: use the first so many; None is all.
        device: ``cpu`` or ``cuda``.
        memory: bytes of activations that may be held in memory; more is spilled.
        cache: folder where what the reference's last block gives is kept, so that other models are compared with it
            at half the cost; found again for the same files, tokens, windows and precision only.
        precision: of matrix products, ``float32`` or ``bfloat16`` (see `products_in`): about half the time on
            processors with AMX. Of SmolLM2-135M at 3 bits it moved a divergence of .470 nats by .1 %.
        trust_remote_code: run Python code from the folders.
        progress: told of blocks and windows done.

    Raises:
        ModelError, CalibrationError: a folder or the text cannot be used.
        ConfigError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ConfigError(unknown("precision", precision, PRECISIONS))
    sources = [open_source(folder, trust_remote_code=trust_remote_code) for folder in (model, against) if folder]
    tokenizer = load_tokenizer(sources[0].folder, trust_remote_code=trust_remote_code)
    for source in sources:
        check_vocabulary(tokenizer, source.config)
    longest = getattr(sources[0].config.get_text_config(), "max_position_embeddings", None) or DEFAULT_SEQLEN
    if seqlen is not None and seqlen > longest:
        raise CalibrationError(f"--seqlen is {seqlen}, but the model takes at most {longest} positions.")
    chosen = consecutive_windows(
        read_text(text, tokenizer, split=EVALUATED.get(text, "test")),
        tokenizer,
        seqlen=seqlen or min(DEFAULT_SEQLEN, longest),
        windows=windows,
        source=text,
    )
    with tempfile.TemporaryDirectory(prefix="mezzotint-") as scratch, ExitStack() as stack, torch.no_grad():
        stack.enter_context(products_in(precision))
        divergence = _compare(
            sources, chosen, Path(scratch), stack, device=device, memory=memory, cache=cache, progress=progress
        )
    # the name of a file, not the place where it lay
    return divergence.result(chosen.seqlen, text=Path(text).name, digest=_digest(chosen)[:16])


def compare(
    model: Path, against: Source, windows: Windows, *, device: str, memory: int | None, cache: Path, trust: bool
) -> Evaluation:
    """Perplexity of a folder and its divergence from another on windows that are there already; padding is not scored.

    Args:
        model: folder, quantized or not.
        against: the reference.
        windows: tokens.
        device: where blocks run.
        memory: bytes of activations that may be held in memory.
        cache: folder where what the reference's last block gives is kept for the next comparison.
        trust: run Python code from the folders.
    """
    sources = [open_source(model, trust_remote_code=trust), against]
    with tempfile.TemporaryDirectory(prefix="mezzotint-") as scratch, ExitStack() as stack, torch.no_grad():
        divergence = _compare(
            sources,
            windows,
            Path(scratch),
            stack,
            device=device,
            memory=memory,
            cache=cache,
            progress=lambda *_: None,
        )
    return divergence.result(windows.seqlen, text=windows.source, digest=_digest(windows)[:16])


def _compare(
    sources: list[Source],
    windows: Windows,
    scratch: Path,
    stack: ExitStack,
    *,
    device: str,
    memory: int | None,
    cache: Path | None,
    progress: Callable[[int, int], None],
) -> Divergence:
    batches = list(batches_of(windows, held_out=True))
    budget = Budget(None if memory is None else memory // 2)
    total = sum(len(source.map.blocks) for source in sources) + len(batches)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    shelf = Shelf(budget, scratch)
    finals = [run_blocks(sources[0], batches, Store(budget, scratch), shelf, device=device, step=step)]
    for source in sources[1:]:
        store = Store(budget, scratch)
        kept = (
            None
            if cache is None
            else cache / f"{_fingerprint(source, windows, torch.get_float32_matmul_precision())}.safetensors"
        )
        if kept is not None and kept.is_file():
            for name, hidden in load_file(kept, device=device).items():
                store.put(int(name), hidden)
        else:
            run_blocks(source, batches, store, shelf, device=device, step=step)
            if kept is not None:
                _keep({str(index): store.get(index).cpu().contiguous() for index in range(len(batches))}, kept)
        finals.append(store)
    bypasses = [
        stack.enter_context(surroundings(source, head=True, dtype=torch.float32, device=device)) for source in sources
    ]
    divergence = Divergence(reference=len(sources) > 1)
    vocabulary = sources[0].config.get_text_config().vocab_size
    for index, batch in enumerate(batches):
        outputs = [store.get(index) for store in finals]
        for row in range(batch.tokens.shape[0]):
            tokens = batch.tokens[row : row + 1].to(device)
            hidden = [output[row : row + 1] for output in outputs]
            mask = None if batch.mask is None else batch.mask[row]
            for positions in chunks(tokens.shape[1], vocabulary, LOGIT_BYTES):
                real = None if mask is None else mask[positions] & mask[positions + 1]
                divergence.add(*_logits(bypasses, hidden, tokens, positions), mask=real)
            divergence.end_window()
        step()
    for store in (*finals, shelf):
        store.close()
    return divergence


def _digest(windows: Windows) -> str:
    """Of the tokens and their windows."""
    digest = hashlib.sha256(windows.tokens.numpy().tobytes())
    digest.update(str(tuple(windows.tokens.shape)).encode())
    return digest.hexdigest()


def _fingerprint(source: Source, windows: Windows, precision: str) -> str:
    """Of a model's files, of the tokens it runs on and of how."""
    digest = hashlib.sha256(f"{_digest(windows)} {precision}".encode())
    for path in sorted(path for path in source.folder.iterdir() if path.suffix in (".json", ".safetensors", ".gguf")):
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


def _keep(hidden: dict[str, torch.Tensor], path: Path) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file(hidden, partial)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise WriteError(
            f"cannot keep the reference's states in {str(path.parent)!r}: {error.strerror}. Free space there, or leave "
            "--cache out."
        ) from error


def _logits(
    bypasses: list[Bypass], hidden: list[torch.Tensor], tokens: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Candidate's logits, targets and reference's logits of one chunk."""
    kept = positions.to(tokens.device)
    logits = [bypass.logits(tokens, h, kept)[0] for bypass, h in zip(bypasses, hidden, strict=True)]
    return logits[0], tokens[0, kept + 1], logits[1] if len(logits) > 1 else None


def run_blocks(
    source: Source, batches: list[Batch], store: Store, shelf: Shelf, *, device: str, step: Callable[[], None]
) -> Store:
    """The last block's output for every batch; ``shelf`` takes what blocks hand on beside it meanwhile."""
    passages: list[Passage] = []
    with surroundings(source, head=False, dtype=torch.float32, device=device) as bypass:
        for index, batch in enumerate(batches):
            mask = None if batch.mask is None else batch.mask.to(device)
            hidden, calls = bypass.record(batch.tokens.to(device), mask)
            passages.append(Passage(calls, shelf))
            store.put(index, hidden)
    for block in source.map.blocks:
        module = source.skeleton.get_submodule(block.path)
        materialize(module, block.path, source.checkpoint, dtype=torch.float32, device=device)
        for index in range(len(batches)):
            output = passages[index].through(module, block.index, store.get(index))
            if not torch.isfinite(output).all():
                raise NonFiniteError(f"block {block.index} of {source.folder.name!r} gives NaN or infinity.")
            store.put(index, output)
        dematerialize(module)
        step()
    for passage in passages:
        passage.close()
    return store


LOGIT_BYTES = 256 * 2**20  # of logits and what is computed from them, at a time
