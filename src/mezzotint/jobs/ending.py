"""Files that are written after the tensors. They are read, checked and rendered before the work."""

import glob
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mezzotint.errors import ModelError
from mezzotint.formats.companions import companions, copy_companions
from mezzotint.report.card import CARD_NAME, card_of, legal_front_matter
from mezzotint.report.report import REPORT_NAME
from mezzotint.storage.files import json_bytes, text_bytes, write_bytes
from mezzotint.storage.folder import WEIGHTS

CONFIG_NAME = "config.json"


class Ending:
    """The files of an output folder beside its tensors.

    Args:
        original: folder of the model that they come from.
        trusted: its Python code goes along.

    Attributes:
        names: of the files, for `OutputFolder.announce`.
        warnings: what is left out of the result, and why; in the report too.

    Raises:
        ModelError: a file that goes along cannot be read.
    """

    def __init__(self, original: Path, *, trusted: bool) -> None:
        self._original = original
        self._companions = companions(original, trusted=trusted)
        self._config = (original / CONFIG_NAME).read_text(encoding="utf-8")
        self._legal, why = legal_front_matter(original)
        self.names = (CONFIG_NAME, REPORT_NAME, CARD_NAME, *map(glob.escape, self._companions))
        self.warnings = [] if why is None else [why]

    def stamps(self) -> dict[str, list[int]]:
        """Sizes and times of the original's tensors: whether it is still the same, without reading it."""
        paths = [path for path in self._original.iterdir() if path.suffix in (".safetensors", ".gguf")]
        return {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(paths) if p.is_file()}

    def config(self) -> dict[str, Any]:
        """config.json of the original, to be changed."""
        return json.loads(self._config)

    def rehearse(self, config: Mapping[str, Any], report: Mapping[str, Any] | None) -> None:
        """Render everything once, with a report in which nothing is measured yet.

        Raises:
            ModelError: config.json cannot be written again.
        """
        try:
            json_bytes(config)
        except RecursionError as error:
            raise ModelError(f"{self._original / CONFIG_NAME} is nested too deeply to be written again.") from error
        if report is not None:
            self._rendered(report)

    def write_config(self, folder: Path, config: Mapping[str, Any]) -> None:
        """config.json, and what goes along with the model."""
        write_bytes(folder / CONFIG_NAME, json_bytes(config))
        self.warnings += copy_companions(self._original, folder, self._companions)

    def write_report(self, folder: Path, report: Mapping[str, Any]) -> dict[str, Any]:
        """The report, with the warnings if there are any, and the card; gives the report."""
        warnings = [*dict.fromkeys([*report.get("warnings", ()), *self.warnings])]
        report = {**report, **({"warnings": warnings} if warnings else {})}
        for name, data in self._rendered(report).items():
            write_bytes(folder / name, data)
        return report

    def _rendered(self, report: Mapping[str, Any]) -> dict[str, bytes]:
        card = card_of(report, {"texts": {}, "tasks": {}}, self._legal)
        return {CARD_NAME: text_bytes(card), REPORT_NAME: json_bytes(report)}


def names_of_tensors(form: str) -> tuple[str, ...]:
    """Of the files that hold tensors in a format, while it is made and afterwards."""
    return (*WEIGHTS, "model.gguf") if form == "gguf" else WEIGHTS
