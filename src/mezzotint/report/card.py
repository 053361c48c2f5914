"""The model card: README.md of an output folder, as the hub shows it."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mezzotint.errors import WriteError
from mezzotint.report.command import recipe_yaml
from mezzotint.report.results import read_results
from mezzotint.storage.files import write_bytes

CARD_NAME = "README.md"
_START, _END = "<!-- measured -->", "<!-- /measured -->"
_MEASURED = re.compile(f"(?<={_START}\n).*?(?={_END})", re.DOTALL)
_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_LONGEST_FRONT = 1 << 20  # characters of front matter that are read; cards with thousands of results have a tenth of it
_LEGAL = ("license", "license_name", "license_link", "language")  # what a derived model passes on
_EVENTS = yaml.CBaseLoader if yaml.__with_libyaml__ else yaml.BaseLoader

_TRANSFORMERS = """In transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```
"""
_PACKED = _TRANSFORMERS.replace("In transformers:", "In transformers, with `compressed-tensors` 0.18 or later:")
_VLLM = """In vLLM{note}:

```
vllm serve FOLDER
```
"""
_NATIVE = """In transformers, with `mezzotint` installed; weights stay packed in memory:

```python
import mezzotint
from transformers import AutoTokenizer

model = mezzotint.load("FOLDER", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

For other engines, quantize again with `--for dense`, or with a recipe that stores integers.
"""
_GGUF = """In llama.cpp:

```
llama-server -m FOLDER/model.gguf
```

In transformers, with `gguf` and `accelerate`, as dense weights (without `config` for the architecture Mistral):

```python
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER", gguf_file="model.gguf", config=config, dtype="auto")
```
"""
_GPTQ = _TRANSFORMERS.replace(
    "In transformers:",
    "In transformers, with `gptqmodel` and `optimum`, where all matrices have the same bits and groups:",
)
_GPTQ_MODEL = """In GPTQModel:

```python
from gptqmodel import GPTQModel

model = GPTQModel.load("FOLDER")
```
"""
_OWN = """The format `{form}` is not part of mezzotint. Import the code that adds it; then

```python
import mezzotint

mezzotint.convert("FOLDER", "dense", out="DENSE")
```

writes a folder that every engine loads.
"""
_EXL3 = """In ExLlamaV3 on a GPU. This is not tested: the file layout follows its source code.
"""
_LOADING = {
    "exl3": (_EXL3,),
    "gguf": (_GGUF,),
    "compressed-tensors": (
        _PACKED,
        _VLLM.format(note=" (bits other than 4 and 8 need kernels that only some GPUs have)"),
    ),
    "gptq": (_GPTQ_MODEL, _GPTQ, _VLLM.format(note=" (symmetric, 4 and 8 bits; on a CPU 4)")),
    "gptq-v2": (_GPTQ_MODEL, _GPTQ, _VLLM.format(note=" (symmetric, 4 and 8 bits; on a CPU 4)")),
    "mezzotint": (_NATIVE, _VLLM.format(note=", with `mezzotint` installed in the same environment")),
    "dense": (_TRANSFORMERS, _VLLM.format(note="")),
}


def update_card(folder: Path) -> None:
    """Bring what was measured up to date in a card that we wrote; any other stays as it is.

    Raises:
        WriteError: it cannot be written.
    """
    path = folder / CARD_NAME
    if not path.is_file():
        return
    # somebody may have edited it, in another encoding: what is not understood stays as it is
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    changed = _MEASURED.sub(lambda _: _measured(read_results(folder)), text)
    if changed == text:
        return
    try:
        write_bytes(path, changed.encode("utf-8", errors="surrogateescape"))
    except OSError as error:
        raise WriteError(f"cannot write {str(path)!r}: {error.strerror}. Evaluate without --keep-results.") from error


def card_of(report: Mapping[str, Any], results: Mapping[str, Any], original: Mapping[str, Any]) -> str:
    """The whole card.

    Args:
        report: ``mezzotint.json``.
        results: what `read_results` gives.
        original: front matter of the original's card; empty if it has none.
    """
    model, form = report["model"], report["plan"]["format"]
    bits = report["bits_per_weight"]
    front = {
        "base_model": model,
        "base_model_relation": "quantized",
        "library_name": form if form in ("mezzotint", "gguf") or form not in _LOADING else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mezzotint", "quantized", form],
        **{name: original[name] for name in _LEGAL if name in original},
    }
    made = f"recipe `{report['recipe']['name']}`"
    if report["recipe"].get("paper"):
        made += f" ({report['recipe']['paper']})"
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n",
        f"# {model} at {bits:.2f} bits per weight\n",
        f"Quantized with Mezzotint {report['mezzotint']}, {made}.\n",
        _sizes(report),
        "## Evaluation\n",
        f"{_START}\n{_measured(results)}{_END}\n",
        "## Load it\n",
        loading(form),
        "## How it was quantized\n",
        _recipe(report),
    ]
    return "\n".join(sections)


def loading(form: str, folder: str = "FOLDER") -> str:
    """How to load a folder of a format, in each engine that can."""
    parts = _LOADING.get(form, (_OWN.format(form=form),))
    return "\n".join(part.replace("FOLDER", folder) for part in parts)


def _sizes(report: Mapping[str, Any]) -> str:
    linears, weights = report["plan"]["linears"], 0
    for linear in linears:
        weights += linear["shape"][0] * linear["shape"][1]
    without = report["bits_per_weight_without_side_data"]
    rows = [
        ("weights quantized", f"{weights / 1e6:,.1f} million in {len(linears)} matrices"),
        ("bits per weight", f"{report['bits_per_weight']:.3f} ({without:.3f} without scales and zero points)"),
        ("size", f"{report['output_bytes'] / 1e6:,.1f} MB, before {report['original_bytes'] / 1e6:,.1f} MB"),
    ]
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows)


def _measured(results: Mapping[str, Any]) -> str:
    """Tables of what was kept, with what one number of them can bear."""
    parts = []
    if results["texts"]:
        lines = ["| text | windows | perplexity | original | KL, nats/token |", "|---|---|---|---|---|"]
        for name, text in results["texts"].items():
            before = "" if text["reference_perplexity"] is None else f"{text['reference_perplexity']:.3f}"
            loss = "" if text["kl_nats"] is None else plus_minus(text["kl_nats"], text["kl_stderr"])
            own = plus_minus(text["perplexity"], text["perplexity_stderr"], 3)
            lines.append(f"| {name} | {text['windows']} x {text['seqlen']} | {own} | {before} | {loss} |")
        parts.append("\n".join(lines) + "\n")
    if results["tasks"]:
        lines = ["| task | metric | score | original | difference |", "|---|---|---|---|---|"]
        for name, task in results["tasks"].items():
            before = "" if task["reference"] is None else plus_minus(task["reference"], task["reference_stderr"])
            change = "" if task["difference"] is None else interval(task["difference"])
            own = plus_minus(task["value"], task["stderr"])
            lines.append(f"| {name} | {task['metric']} | {own} | {before} | {change} |")
        parts.append(
            "\n".join(lines) + "\n\nDifferences are over the same questions, with 95 % confidence intervals.\n"
        )
    return (
        "\n".join(parts)
        or "Not measured yet. Run `mezzotint evaluate FOLDER --against ORIGINAL --text FILE --keep-results`.\n"
    )


def plus_minus(value: float, stderr: float | None, digits: int = 4) -> str:
    """A value with its standard error."""
    return f"{value:.{digits}f}" if stderr is None else f"{value:.{digits}f} ± {stderr:.{digits}f}"


def interval(difference: Mapping[str, float]) -> str:
    """A difference with its confidence interval."""
    return f"{difference['mean']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]"


def _recipe(report: Mapping[str, Any]) -> str:
    calibration = report["plan"]["calibration"]
    imatrix = report["plan"].get("imatrix")
    text = "no calibration" if imatrix is None else f"weighted by the importance matrix `{imatrix}`"
    if calibration is not None:
        source = "text that the model wrote"
        if calibration["source"] != "self":
            source = f"`{Path(calibration['source']).name}`"
        text = f"calibrated on {calibration['samples']} windows of {calibration['seqlen']} tokens of {source}"
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    kept = len(report["plan"]["kept"])
    return (
        f"```\n{report['command']}\n```\n\n{text[0].upper()}{text[1:]}; seed {report['seed']}; {versions}; "
        f"{report['seconds']:.0f} s. {kept} tensors are unchanged. The full report is in "
        f"`mezzotint.json`. The recipe:\n\n```yaml\n{recipe_yaml(report['recipe'])}```\n"
    )


def legal_front_matter(folder: Path) -> tuple[dict[str, str | list[str]], str | None]:
    """What the card of a model says about its licence and languages, and a warning where that cannot be told.

    The card is of somebody else's making. So only these entries are looked at, as text, and the rest is passed over
    event by event: no value is built, and no depth is too deep.
    """
    path = folder / CARD_NAME
    try:
        if not path.is_file():
            return {}, None
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_LONGEST_FRONT)
    except OSError as error:
        return {}, _no_legal(path, f"it cannot be read ({error.strerror})")
    found = _FRONT.match(text)
    if found is None:
        return {}, _no_legal(path, "its front matter is too long") if len(text) == _LONGEST_FRONT else None
    try:
        return _legal(yaml.parse(found[1], _EVENTS)), None
    except yaml.YAMLError as error:
        return {}, _no_legal(path, f"its front matter is not valid YAML ({' '.join(str(error).split())})")


def _no_legal(path: Path, why: str) -> str:
    return (
        f"The card has no licence, because the licence in {path} cannot be read: {why}. Add it to "
        f"{CARD_NAME} of the output."
    )


def _legal(events: Iterable[yaml.Event]) -> dict[str, str | list[str]]:
    """The entries of `_LEGAL` in a mapping, where they are texts or lists of texts."""
    nodes = _parts(events)
    return {str(key): value for key, value in zip(nodes, nodes, strict=False) if key in _LEGAL and value is not None}


def _parts(events: Iterable[yaml.Event]) -> Iterator[str | list[str] | None]:
    """Keys and values of a mapping in turn: a text, a list of texts, or None for anything else."""
    depth, items = 0, None
    for event in events:
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
            if depth == 1:
                yield items
        elif isinstance(event, yaml.NodeEvent):
            starts = isinstance(event, yaml.CollectionStartEvent)
            if depth == 0 and not isinstance(event, yaml.MappingStartEvent):
                return
            if depth == 1 and starts:
                items = [] if isinstance(event, yaml.SequenceStartEvent) else None
            elif depth == 1:
                yield _text(event)
            elif depth == 2 and items is not None:
                text = _text(event)
                items = None if text is None else [*items, text]
            depth += starts


def _text(event: yaml.NodeEvent) -> str | None:
    if not isinstance(event, yaml.ScalarEvent) or (event.implicit[0] and event.value in ("", "~", "null")):
        return None
    return event.value
