"""Errors a user can act on: each message says what, the value, the limit and a remedy.

Leaves also derive from the builtin a caller would expect, so ``except ValueError`` keeps working.
"""

import difflib
from collections.abc import Iterable


class MezzotintError(Exception):
    """Root of every error this package raises on purpose."""


class ConfigError(MezzotintError, ValueError):
    """The request is wrong: a setting, a recipe, an argument. Nothing was written."""


class ModelError(MezzotintError, ValueError):
    """The model folder cannot be used: missing, truncated, of an unknown kind, or with values that are not finite."""


class CalibrationError(MezzotintError, ValueError):
    """The calibration or evaluation text cannot be used."""


class FormatError(MezzotintError, ValueError):
    """The output format cannot hold what the recipe asks for."""


class OutputError(MezzotintError, OSError):
    """The output folder cannot be written: it exists, is not ours, or the disk is too small."""


class InstallationError(MezzotintError, ImportError):
    """A part of the package is missing from the installation, for example the compiled kernels."""


class RunError(MezzotintError):
    """It failed while running: not the request but the disk or the numbers are at fault."""


class WriteError(RunError, OSError):
    """Writing failed half-way, for example because the disk is full."""


class VanishedError(RunError, ModelError, OSError):
    """A file of the model vanished or shrank after the plan was made."""


class RankError(RunError):
    """Another process of the run has failed, was killed, or does not answer."""


class NotPositiveDefiniteError(RunError, ArithmeticError):
    """A Hessian could not be factored."""


class NonFiniteError(MezzotintError, ArithmeticError):
    """NaN or infinity appeared in weights or activations."""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Message for an unknown name, with the nearest known one: ``unknown method 'gptQ'. Did you mean 'gptq'?``."""
    names = sorted(known)
    lowered = {candidate.lower(): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.5)
    hint = f" Did you mean {lowered[close[0]]!r}?" if close else ""
    return f"unknown {what} {name!r}.{hint} Known: {', '.join(names)}."
