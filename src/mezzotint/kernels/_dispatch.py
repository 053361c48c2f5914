"""Which calls the C++ kernels take, and in what shape they want their tensors."""

import torch
from torch import Tensor

from mezzotint.errors import ConfigError, InstallationError

try:
    from mezzotint.kernels import _native
except ImportError as error:
    raise InstallationError(
        f"the compiled kernels of mezzotint cannot be loaded ({error}). In a clone of the repository run `make venv`; "
        "otherwise install the package again, from a wheel or with a C++17 compiler. `mezzotint doctor` shows more."
    ) from error

_LANES = 16
_HALVES = (torch.bfloat16, torch.float16)
# Low bits of a float32 that a scale of this dtype does not have.
_DROPPED_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


def available_levels() -> tuple[str, ...]:
    """Instruction sets this processor can run, slowest first: ``portable``, ``avx2``, ``avx512``.

    Example:
        >>> available_levels()[0]
        'portable'
    """
    return tuple(_native.available_levels())


def multiplies_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 numbers as such (AVX512-BF16, which processors with AMX have too)."""
    return _native.multiplies_bfloat16()


def takes_native(level: str | None, *tensors: Tensor | None, levels: tuple[str, ...] | None = None) -> bool:
    """Whether the C++ kernels can work on these tensors: all on the CPU and none of float64.

    Args:
        level: asked for by name, or None.
        tensors: what the kernel would read.
        levels: that the kernel is built for and this processor can run; `available_levels()` if None.

    Raises:
        ConfigError: a level was asked for by name and the tensors, or this processor, do not allow it.
    """
    native = all(t is None or (t.is_cpu and t.dtype != torch.float64) for t in tensors)
    if level is None:
        return native
    usable = available_levels() if levels is None else levels
    if level not in usable:
        raise ConfigError(f"level {level!r} is not one of {', '.join(usable)} on this processor; leave it out.")
    if not native:
        raise ConfigError(f"level {level!r} is for tensors on the CPU that are not float64; leave it out.")
    return True


def thread_count(threads: int | None) -> int:
    """Threads to use: as many as torch uses, unless the caller says.

    Raises:
        ConfigError: fewer than one.
    """
    if threads is not None and threads < 1:
        raise ConfigError(f"threads is {threads}; use at least 1.")
    return torch.get_num_threads() if threads is None else threads


def as_float32(tensor: Tensor) -> Tensor:
    """The tensor as contiguous float32, without a copy when it is that already."""
    if tensor.dtype == torch.float32 and not tensor.requires_grad and tensor.is_contiguous():
        return tensor  # three calls to torch less, which small products feel
    return tensor.detach().to(torch.float32).contiguous()


def as_native_values(tensor: Tensor) -> Tensor:
    """Contiguous float32, bfloat16 or float16: 16-bit values are widened inside the kernel, element by element."""
    return tensor.detach().contiguous() if tensor.dtype in _HALVES else as_float32(tensor)


def check_bits(bits: int, lowest: int = 1) -> None:
    """Refuses bits outside ``lowest ... 8``: a code is a byte.

    Raises:
        ConfigError: with the value and the limits.
    """
    if not lowest <= bits <= 8:
        raise ConfigError(f"bits is {bits}; use {lowest} to 8.")


def dropped_bits(scale_dtype: torch.dtype) -> int:
    """How the C++ kernels name a dtype that scales are rounded to.

    Raises:
        ConfigError: scales are not stored in it.
    """
    if scale_dtype not in _DROPPED_BITS:
        raise ConfigError(f"scale_dtype is {scale_dtype}; use torch.float32, torch.float16 or torch.bfloat16.")
    return _DROPPED_BITS[scale_dtype]


def group_count(columns: int, group_size: int) -> int:
    """Groups in a row; the last one may be shorter.

    Raises:
        ConfigError: group_size is not positive.

    Example:
        >>> group_count(100, 64)
        2
    """
    if group_size < 1:
        raise ConfigError(
            f"group_size is {group_size}; use at least 1, or the number of columns for one group per row."
        )
    return -(-columns // group_size)


def check_group_shape(name: str, tensor: Tensor, rows: int, groups: int) -> None:
    """Refuses a per-group tensor that is not ``[rows, groups]``.

    Raises:
        ConfigError: with both shapes.
    """
    if tuple(tensor.shape) != (rows, groups):
        raise ConfigError(f"{name} has shape {tuple(tensor.shape)}; these groups need ({rows}, {groups}).")


def check_blocks(between: Tensor, rows: int) -> None:
    """Refuses squares between the rows of blocks that are not those of so many rows.

    Raises:
        ConfigError: with both numbers.
    """
    blocks, size, _ = between.shape
    if size % _LANES or blocks != -(-rows // size):
        raise ConfigError(f"{blocks} blocks of {size} are not those of {rows} rows, or no multiple of {_LANES}.")


def as_squares(between: Tensor | None) -> Tensor | None:
    """Squares between the rows of blocks, one below the other, as the C++ kernels want them."""
    return None if between is None else as_float32(between).flatten(0, 1)
