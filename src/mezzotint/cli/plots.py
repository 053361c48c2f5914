"""Pictures, through matplotlib (extra ``report``)."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint.errors import ConfigError, WriteError

if TYPE_CHECKING:
    from mezzotint.jobs.drift import Drift

SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: Path | None) -> None:
    """Refuse before any work what could not be drawn after it.

    Raises:
        ConfigError: the suffix is unknown, the folder does not exist, or matplotlib is not installed.
    """
    if path is None:
        return
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--plot is {str(path)!r}; its name must end in {', '.join(SUFFIXES)}.")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot is {str(path)!r}; the folder {str(path.parent)!r} does not exist. Make it first.")
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed. Run: pip install 'mezzotint[report]'.")


def plot_drift(found: "Sequence[Drift]", path: Path) -> None:
    """Relative error behind every block, one line a recipe, the quantized blocks shaded.

    Raises:
        WriteError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.axvspan(0.5, found[0].blocks + 0.5, color="0.92", label="quantized blocks")
    for one in found:
        axes.plot(range(1, len(one.relative) + 1), one.relative, marker=".", label=one.recipe)
    axes.set(
        yscale="log",
        xlabel="blocks passed",
        ylabel="squared difference of the streams\nover the square of the original's",
    )
    axes.grid(visible=True, which="both", color="0.9")
    axes.legend()
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a picture.

    Raises:
        WriteError: the file cannot be written.
    """
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise WriteError(f"cannot write {str(path)!r}: {error.strerror}. Give --plot another path.") from error
