"""Takes a model through every step of the library and says where it stopped."""

import contextlib
import dataclasses
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import mezzotint
from mezzotint.blockwise.source import open_source
from mezzotint.blockwise.whole import dense_model
from mezzotint.errors import MezzotintError
from mezzotint.models import open_model
from mezzotint.models.skeleton import quiet

DATA = Path(__file__).parents[1] / "data"
TEXT = DATA / "tiny_text.txt"
HELD_OUT = DATA / "tiny_text_heldout.txt"
SAMPLES, SEQLEN, WINDOWS = 8, 32, 8
LIMIT_SECONDS = 120
FRAMES = 12  # of a traceback, that are kept
PLUMBING = ("/jaxtyping/", "/torch/", "/contextlib.py")  # frames that tell nothing, but where they raise

OK, REFUSED, CRASH, WRONG, SLOW = "ok", "REFUSED", "CRASH", "WRONG", "SLOW"
REFUSING = ("map", "plan")  # stages in which a message of ours is a refusal; later it comes too late

# Of logits, root mean square over root mean square, at the median token: what two orders of summing differ by in
# float32. One sum of n = 128 products errs by about sqrt(n) * 2^-24, and a few layers of random weights, with their
# norms and exponentials, amplify it by less than a hundred. A token that a router sends elsewhere does not move the
# median.
LOGITS = 1e-4
# The reader of compressed-tensors multiplies a scale and an integer in bfloat16, ours in float32: half a unit in the
# last place of 8 bits.
WEIGHTS = 2**-8
# Weights that are written in bfloat16 are rounded by as much, relative to each: that moves the norm of the error.
ROUNDED = 2**-9
SUMMED = 1e-4  # of two sums of squares in float32, relative


class MismatchError(Exception):
    """Something came out that was not meant."""


class TimeUp(BaseException):
    """The step took too long; no handler of errors may take it for one."""


@dataclasses.dataclass(kw_only=True)
class Outcome:
    """How far a model came in a step.

    Attributes:
        stage: in which it ended: map, plan, quantize, reload, weights, logits, report or evaluate.
        what: the message, or type and first line of an exception.
        where: innermost file and line of ours, and innermost of all.
        frames: the innermost ones of the traceback.
        stepped_down: what the recipe could not do for this model and did more simply, as the report tells.
        format: of the result.
        share: of the weights of all matrices but the embedding and the head, that are quantized.
        kl_nats: divergence from the original on text that was not calibrated on.
    """

    name: str
    step: str
    status: str = OK
    stage: str = ""
    what: str = ""
    where: str = ""
    frames: str = ""
    stepped_down: list[str] = dataclasses.field(default_factory=list)
    format: str = ""
    share: float | None = None
    kl_nats: float | None = None
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A quantization: recipe, bits, what the divergence has to be under, and further arguments of `quantize`."""

    recipe: str
    bits: float
    kl_nats: float
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


QUANTIZING = {
    "rtn": Step(recipe="rtn", bits=8.0, kl_nats=0.05),
    "default": Step(recipe="default", bits=4.0, kl_nats=1.0),
    "best": Step(recipe="best", bits=4.0, kl_nats=1.0),
    "self": Step(recipe="gptq", bits=4.0, kl_nats=1.0, options={"calibration": "self"}),
    "own": Step(recipe="qep-trellis", bits=4.0, kl_nats=1.0, options={"engine": "mezzotint"}),
}
STEPS = ("map", "plan", *QUANTIZING)


def walk(name: str, model: Path, place: Path, steps: Sequence[str] = STEPS) -> list[Outcome]:
    """Every step with a model.

    Args:
        name: of the model, for the record.
        model: its folder.
        place: folder for results; they are removed again.
        steps: some of `STEPS`.
    """
    walker = _Walker(model, place)
    return [_attempt(Outcome(name=name, step=step), walker.work_of(step)) for step in steps]


def _attempt(outcome: Outcome, work: Callable[[Outcome], None]) -> Outcome:
    """Do the work within the limit of time; whatever it raises goes into the outcome."""
    started = time.perf_counter()
    try:
        with _limit(LIMIT_SECONDS), quiet():
            work(outcome)
        outcome.stage = ""
    except MezzotintError as error:
        outcome.status = REFUSED if outcome.stage in REFUSING else WRONG
        _describe(outcome, error, str(error))
    except MismatchError as error:
        outcome.status, outcome.what = WRONG, str(error)
    except TimeUp as error:
        outcome.status = SLOW
        _describe(outcome, error, f"takes more than {LIMIT_SECONDS} s")
    except Exception as error:
        outcome.status = CRASH
        lines = str(error).strip().splitlines() or [""]
        _describe(outcome, error, f"{type(error).__name__}: {lines[0]}")
    outcome.seconds = round(time.perf_counter() - started, 2)
    return outcome


def _describe(outcome: Outcome, error: BaseException, what: str) -> None:
    every = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in every[:-1] if not any(part in frame.filename for part in PLUMBING)] + every[-1:]
    ours = [frame for frame in frames if "/mezzotint/" in frame.filename]
    model = [frame for frame in frames if "/transformers/models/" in frame.filename]
    ends = [f"{_short(frame.filename)}:{frame.lineno}" for frame in (*ours[-1:], *model[-1:], frames[-1])]
    outcome.what = " ".join(what.split())
    outcome.where = " < ".join(dict.fromkeys(ends))
    outcome.frames = "".join(
        f"{_short(frame.filename)}:{frame.lineno} in {frame.name}: {frame.line}\n" for frame in frames[-FRAMES:]
    )


def _short(path: str) -> str:
    """From the package on."""
    for package in ("/mezzotint/", "/site-packages/", "/tests/", "/lib/"):
        if package in path:
            return path.rpartition(package)[2]
    return path


@contextlib.contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # again every second: what is raised in a finalizer is lost
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _Walker:
    """The steps of one model."""

    def __init__(self, model: Path, place: Path) -> None:
        self._model = model
        self._place = place
        self._original: dict[str, Tensor] | None = None

    def work_of(self, step: str) -> Callable[[Outcome], None]:
        """What is to be done in a step."""
        if step == "map":
            return self._map
        if step == "plan":
            return lambda outcome: self._plan(outcome, QUANTIZING["default"])
        return lambda outcome: self._quantize(outcome, QUANTIZING[step])

    def _map(self, outcome: Outcome) -> None:
        outcome.stage = "map"
        if not open_model(self._model).map.matrices:
            raise MismatchError("no matrix is known")

    def _plan(self, outcome: Outcome, step: Step) -> None:
        outcome.stage = "plan"
        mezzotint.plan(self._model, step.recipe, **_arguments(step))

    def _quantize(self, outcome: Outcome, step: Step) -> None:
        self._plan(outcome, step)
        out = self._place / f"{outcome.name}-{outcome.step}"
        partial = out.with_name(out.name + ".partial")
        for folder in (out, partial):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            outcome.stage = "quantize"
            report = mezzotint.quantize(self._model, step.recipe, out=out, **_arguments(step))
            outcome.stepped_down = steps_down(report)
            outcome.format = report["plan"]["format"]
            source = report["plan"]["calibration"]
            if step.options.get("calibration") == "self" and (source is None or source["source"] != "self"):
                raise MismatchError(f"calibrated on {source}, not on text of its own")
            self._check(outcome, out, report)
            outcome.stage = "evaluate"
            found = mezzotint.evaluate(
                out, HELD_OUT, against=self._model, seqlen=SEQLEN, windows=WINDOWS, cache=self._place / "states"
            )
            outcome.kl_nats = found.kl_nats
            if found.kl_nats is None or not found.kl_nats < step.kl_nats:
                raise MismatchError(f"KL is {found.kl_nats:.3g} nats at {step.bits:g} bits, over {step.kl_nats:g}")
        finally:
            for folder in (out, partial):
                shutil.rmtree(folder, ignore_errors=True)

    def _check(self, outcome: Outcome, out: Path, report: dict[str, Any]) -> None:
        """The folder holds what the report says, and stock transformers reads what we read."""
        outcome.stage = "report"
        source = open_source(out)
        dense = dense_model(source, device="cpu")
        matrices = {linear["name"]: source.map.matrices[linear["name"]] for linear in report["linears"]}
        outcome.share = share_of(dense, [matrix.shape for matrix in matrices.values()])
        original = self._weights()
        check_copied(dense, original, {matrix.parameter for matrix in matrices.values()})
        for linear in report["linears"]:
            matrix = matrices[linear["name"]]
            values = matrix.view(dense.get_parameter(matrix.parameter))
            check_error(linear, values, matrix.view(original[matrix.parameter]), rounded=outcome.format == "dense")
        outcome.stage = "reload"
        stock = reloaded(out)
        first = logits_of(stock)  # unpacks what is unpacked
        outcome.stage = "weights"
        take_weights_(dense, stock)
        outcome.stage = "logits"
        check_logits(first, logits_of(dense))

    def _weights(self) -> dict[str, Tensor]:
        """Parameters of the original, in float32, by name."""
        if self._original is None:
            original = dense_model(open_source(self._model), device="cpu")
            self._original = dict(original.named_parameters(remove_duplicate=False))
        return self._original


def _arguments(step: Step) -> dict[str, Any]:
    small = {"calibration": TEXT, "samples": SAMPLES, "seqlen": SEQLEN, "device": "cpu", "bits": step.bits}
    return {**small, **step.options}


def steps_down(report: dict[str, Any]) -> list[str]:
    """What was done more simply than the recipe says; nothing where the report does not tell."""
    return [f"{step['what']}: {step['why']}" for step in report["plan"]["stepped_down"]]


def share_of(model: PreTrainedModel, shapes: Sequence[tuple[int, int]]) -> float:
    """Weights in matrices of these shapes, over those in all but the embedding and the head."""
    apart = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    apart |= set() if head is None else {id(head.weight)}
    sizes = [value.numel() for value in model.parameters() if value.dim() > 1 and id(value) not in apart]
    return sum(rows * columns for rows, columns in shapes) / sum(sizes)


def reloaded(folder: Path) -> PreTrainedModel:
    """The model as transformers loads it; every tensor of the folder has its place and every parameter its tensor."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    for problem, tensors in info.items():
        if tensors:
            raise MismatchError(f"transformers reports {problem}: {', '.join(map(str, sorted(tensors)[:3]))}")
    return model.eval()


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    """Logits of a few random tokens, ``[tokens, vocabulary]``."""
    tokens = torch.randint(3, 250, (2, SEQLEN), generator=torch.Generator().manual_seed(1))
    return model(input_ids=tokens, use_cache=False).logits.flatten(0, 1).float()


def check_copied(dense: nn.Module, original: dict[str, Tensor], changed: set[str]) -> None:
    """Raise where a parameter that nothing was done to has other bits than the original."""
    for name, value in dense.named_parameters(remove_duplicate=False):
        if name not in changed and not torch.equal(value, original[name]):
            raise MismatchError(f"{name} is not quantized and has changed")


def check_error(linear: dict[str, Any], values: Tensor, original: Tensor, *, rounded: bool) -> None:
    """Raise where the error of a matrix is not what its record in the report says.

    Both are norms of a difference over the norm of the original. With ``R`` what rounding to bfloat16 adds,
    ``||V + R - W||`` and ``||V - W||`` differ by at most ``||R||``.
    """
    scale = original.norm()
    found, told = float((values - original).norm() / scale), linear["weight_error"] ** 0.5
    allowed = SUMMED * told + (ROUNDED * float(values.norm() / scale) if rounded else 0.0)
    if not abs(found - told) <= allowed:
        raise MismatchError(f"{linear['name']} has the error {found:.4g}, and the report says {told:.4g}")


@torch.no_grad()
def take_weights_(dense: nn.Module, stock: nn.Module) -> None:
    """Give the dense model the values of the other one, where it has them unpacked; raise where they do not agree."""
    state = stock.state_dict()
    for name, value in dense.named_parameters():
        if name not in state or state[name].shape != value.shape:
            continue  # packed
        other = state[name].float()
        if not bool(((other - value).abs() <= WEIGHTS * value.abs()).all()):
            furthest = float((other - value).abs().max())
            raise MismatchError(f"{name} as transformers reads it is {furthest:.3g} away")
        value.copy_(other)


def check_logits(found: Tensor, expected: Tensor) -> None:
    """Raise where they differ by more than the rounding of sums, or are not finite."""
    if not bool(torch.isfinite(found).all()):
        raise MismatchError("logits are not finite")
    ratio = ((found - expected).square().mean(-1) / expected.square().mean(-1)).sqrt().median()
    if not float(ratio) <= LOGITS:
        raise MismatchError(f"logits of transformers are {float(ratio):.3g} of their size away from ours")
