"""Settings as nested dictionaries: dotted names, and stages built and checked from them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mezzotint.errors import ConfigError, unknown
from mezzotint.registry import Registry

Settings = dict[str, Any]


def fields_of(cls: type) -> tuple[str, ...]:
    """Names of a stage's settings."""
    return tuple(f.name for f in dataclasses.fields(cls))


def with_setting(settings: Mapping[str, Mapping[str, Any]], name: str, value: Any) -> dict[str, Settings]:
    """A copy with one dotted setting changed; another ``kind`` drops what the old kind had been set to.

    Raises:
        ConfigError: the first part of the name is no stage, or the name has not two parts.
    """
    stage, _, key = name.partition(".")
    if stage not in settings or not key:
        raise ConfigError(unknown("setting", name, [f"{known}.…" for known in settings]))
    changed = {known: dict(values) for known, values in settings.items()}
    if key == "kind" and changed[stage].get("kind") != value:
        changed[stage] = {"kind": value}
    changed[stage][key] = value
    return changed


def build(stage: str, settings: Mapping[str, Any], registry: Registry) -> Any:
    """The stage that the settings describe.

    Args:
        stage: name of the stage, for messages.
        settings: ``kind`` and the kind's own settings.
        registry: kinds by name.

    Raises:
        ConfigError: unknown kind or setting (with a suggestion), or a value that does not fit.
    """
    values = dict(settings)
    if "kind" not in values:
        raise ConfigError(f"stage {stage!r} has no kind. Write {stage}: {{kind: NAME}}; known: {', '.join(registry)}.")
    cls = registry[str(values.pop("kind"))]
    known = fields_of(cls)
    for name in values:
        if name not in known:
            raise ConfigError(unknown("setting", f"{stage}.{name}", [f"{stage}.{other}" for other in known]))
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise ConfigError(_first_message(stage, error)) from error


def _first_message(stage: str, error: ValidationError) -> str:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return str(cause)
    name = ".".join([stage, *(str(part) for part in first["loc"][:1])])
    return f"setting {name!r} cannot be {first['input']!r}: {first['msg']}."
