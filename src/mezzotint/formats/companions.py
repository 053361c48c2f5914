"""What a model folder needs beside its weights and config.json: the files of its tokenizer, its licence, its code."""

import os
import stat
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from mezzotint.errors import ModelError
from mezzotint.storage.files import write_bytes

# What a tokenizer, a generation or a processor reads. A list of what may come, not of what may not: an unknown file can
# be a pickle under any name. config.json and README.md are the caller's to write.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tekken.json",
    "*.tiktoken",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "encoder.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
)


def companions(source: Path, *, trusted: bool = False) -> tuple[str, ...]:
    """Names, relative to a model folder, of the files that go with the weights, sorted; each of them can be read.

    Args:
        source: the model's folder; links in it are followed, as in the hub's cache.
        trusted: also ``*.py``; the code of a model runs only where the user said that it may.

    Raises:
        ModelError: one of them cannot be read, so that the result would lack it.
    """
    patterns = (*_COMPANIONS, "*.py") if trusted else _COMPANIONS
    found = []
    for path in sorted((*source.glob("*"), *source.glob("additional_chat_templates/*"))):
        name = path.relative_to(source).as_posix()
        # `*` of fnmatch also crosses a slash; the depth must agree.
        wanted = any(fnmatch(name, p) and name.count("/") == p.count("/") for p in patterns)
        if wanted and not path.is_dir():
            why = _unreadable(path)
            if why is not None:
                raise ModelError(
                    f"{path} goes with the model and cannot be read: {why}. Put it back, make it readable, or "
                    "remove it."
                )
            found.append(name)
    return tuple(found)


def copy_companions(source: Path, target: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Copy what `companions` named; the work is done by now, so what cannot be read any more is left out.

    Args:
        source: the original model's folder.
        target: exists.
        names: of the files.

    Returns:
        A warning for each that was left out.

    Raises:
        OSError: the target cannot be written.
    """
    warnings = []
    for name in names:
        why = _unreadable(source / name)
        if why is not None:
            warnings.append(f"{name} was left out, because {source / name} cannot be read any more: {why}. Copy it.")
            continue
        (target / name).parent.mkdir(exist_ok=True)
        write_bytes(target / name, (source / name).read_bytes())
    return tuple(warnings)


def _unreadable(path: Path) -> str | None:
    """Why the bytes of a file cannot be had; a pipe would make its reader wait for ever."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return "it is not a regular file"
        os.close(os.open(path, os.O_RDONLY))
    except FileNotFoundError:
        return "it is a link to nothing" if path.is_symlink() else "it is gone"
    except OSError as error:
        return str(error.strerror)
    return None
