"""How torch computes in tests: the number of threads, and sums in another order than the processor's.

Libraries of matrix products choose the order of a sum by the processor, by shapes and strides, by where in memory a
matrix begins, by the number of threads, and by whether an entry lies at the edge of the result. Here all of these
except the processor change the order. The same product of the same tensors keeps its bits, so tests that compare such
products pass, and tests that compare sums formed in two ways fail.

Another processor is one more such order. That is true of bfloat16 too: a product of two bfloat16 numbers is exact in
float32, so processors with AMX, which multiply tiles, differ from others only in how these products are summed.
"""

import os
import warnings
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import Library, get_kernel

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_EDGE = 4  # rows and columns behind the last multiple of this are an edge
_kept: list[Library] = []  # what a library replaces comes back when the library goes
_seeds: list[int] = []


def set_up() -> None:
    """Take `MEZZOTINT_TEST_THREADS` threads, or one, and shuffle sums with the seed `MEZZOTINT_TEST_SUMS`, or not."""
    threads = os.environ.get("MEZZOTINT_TEST_THREADS", "1")
    torch.set_num_threads(int(threads))
    os.environ.setdefault("OMP_NUM_THREADS", threads)  # of processes that tests start
    if "MEZZOTINT_TEST_SUMS" in os.environ and not _kept:
        shuffle(int(os.environ["MEZZOTINT_TEST_SUMS"]))


def lay_alike(*models: nn.Module) -> None:
    """Copy parameters to memory of the same layout and alignment, on which the order of sums may depend."""
    for model in models:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def _torchs(name: str) -> Callable[..., Any]:
    """Torch's own kernel, looked up before it is replaced."""
    kernel = get_kernel(f"aten::{name}", "CPU")
    return lambda *args, **options: kernel.call_boxed(_CPU, *args, **options)


_mm, _addmm, _bmm, _baddbmm, _addmv, _dot = map(_torchs, ("mm", "addmm", "bmm", "baddbmm", "addmv", "dot"))
_sum, _norm, _cholesky, _solve, _inv = map(
    _torchs,
    ("sum.dim_IntList", "linalg_vector_norm", "linalg_cholesky_ex", "linalg_solve_triangular", "linalg_inv_ex"),
)


def shuffle(seed: int) -> None:
    """Replace torch's products, sums, norms and triangular factors on the CPU, until the process ends."""
    library = Library("aten", "IMPL")
    _seeds.append(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are replaced
        for name, out, made in _REPLACED:
            library.impl(name, made, "CPU")
            library.impl(f"{name.partition('.')[0]}.{out}", _into_out(made), "CPU")
        for name, made in (("addmm_", addmm), ("baddbmm_", baddbmm), ("addmv_", addmv)):
            library.impl(name, _in_place(made), "CPU")
        library.impl("dot", dot, "CPU")
    torch.backends.cuda.enable_flash_sdp(False)  # attention on the CPU, too, is then made of products
    _kept.append(library)


def _in_place(made: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, *args, **options: self.copy_(made(self, *args, **options))


def _into_out(made: Callable[..., Any]) -> Callable[..., Any]:
    def filled(*args: Any, **options: Any) -> Any:
        names = [name for name in ("out", "L", "info", "inverse") if name in options]
        outs = [options.pop(name) for name in names]
        results = made(*args, **options)
        for out, result in zip(outs, results if len(outs) > 1 else [results], strict=True):
            out.resize_(result.shape).copy_(result)
        return tuple(outs) if len(outs) > 1 else outs[0]

    return filled


# ---- orders ----------------------------------------------------------------------------------------------------------


@cache
def _order(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def _seed(*tensors: Tensor) -> int:
    """Of all that the order of a product depends on, besides the place in the result."""
    return _hashed([(t.shape, t.stride(), t.dtype, t.data_ptr() % 64) for t in tensors])


def _hashed(known: object) -> int:
    return zlib.crc32(repr((known, torch.get_num_threads(), _seeds)).encode())


def _product(left: Tensor, right: Tensor, of: Callable[[Tensor, Tensor, slice, slice], Tensor]) -> Tensor:
    """Product of the last two axes, the edge of it summed in orders of its own."""
    (rows, inner), columns, seed = left.shape[-2:], right.shape[-1], _seed(left, right)
    parts = []
    for i, part in enumerate(_core_and_edge(rows)):
        row = []
        for j, column in enumerate(_core_and_edge(columns)):
            order = _order(inner, seed + 2 * i + j)
            row.append(of(left[..., part, :][..., order], right[..., column][..., order, :], part, column))
        parts.append(torch.cat(row, -1))
    return torch.cat(parts, -2)


def _core_and_edge(size: int) -> list[slice]:
    core = size - size % _EDGE
    return [slice(0, core), slice(core, size)]


# ---- what is replaced ------------------------------------------------------------------------------------------------


def mm(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``."""
    return _product(left, right, lambda a, b, *_: _mm(a, b))


def addmm(added: Tensor, left: Tensor, right: Tensor, **factors: Any) -> Tensor:
    """``beta added + alpha left @ right``."""
    added = added.expand(left.shape[0], right.shape[1])
    return _product(left, right, lambda a, b, i, j: _addmm(added[i, j], a, b, **factors))


def bmm(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of stacks of matrices."""
    return _product(left, right, lambda a, b, *_: _bmm(a, b))


def baddbmm(added: Tensor, left: Tensor, right: Tensor, **factors: Any) -> Tensor:
    """``beta added + alpha left @ right`` of stacks of matrices."""
    added = added.expand(len(left), left.shape[1], right.shape[2])
    return _product(left, right, lambda a, b, i, j: _baddbmm(added[:, i, j], a, b, **factors))


def addmv(added: Tensor, left: Tensor, right: Tensor, **factors: Any) -> Tensor:
    """``beta added + alpha left @ right`` of a vector."""
    order = _order(len(right), _seed(left, right))
    return _addmv(added, left[:, order], right[order], **factors)


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Inner product of two vectors."""
    order = _order(len(left), _seed(left, right))
    return _dot(left[order], right[order])


def total(self: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    """Sum over some axes, or all."""
    return _sum(_reordered(self, dim), dim, keepdim, dtype=dtype)


def norm(self: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:  # noqa: A002
    """Norm over some axes, or all."""
    return _norm(_reordered(self, dim), ord, dim, keepdim, dtype=dtype)


def _reordered(values: Tensor, dim: Any) -> Tensor:
    if not values.is_floating_point() or not values.numel():
        return values
    # These loops are torch's own: it adds along an axis alike whatever the other axes are.
    for axis in range(values.dim()) if not dim and dim != 0 else [dim] if isinstance(dim, int) else dim:
        seed = _hashed((values.shape[axis], values.stride(axis), values.dtype))
        values = values.index_select(axis, _order(values.shape[axis], seed))
    return values


def cholesky(self: Tensor, *, upper: bool = False, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    """Lower factor, or upper, and where it failed: two blocks, the second less what the first says of it."""
    half = self.shape[-1] // 2
    if half == 0 or self.dim() > 2 or not torch.isfinite(self).all():
        return _cholesky(self, upper=upper, check_errors=check_errors)
    whole = (self.triu() + self.triu(1).mT) if upper else (self.tril() + self.tril(-1).mT)
    first, failed = _cholesky(whole[:half, :half], check_errors=check_errors)
    if int(failed):
        return _cholesky(self, upper=upper, check_errors=check_errors)
    below = _solve(first.mT, whole[half:, :half], upper=True, left=False)
    second, failed = _cholesky(whole[half:, half:] - mm(below, below.mT), check_errors=check_errors)
    lower = torch.cat([torch.cat([first, torch.zeros_like(below).mT], 1), torch.cat([below, second], 1)], 0)
    return lower.mT.contiguous() if upper else lower, torch.where(failed > 0, failed + half, failed)


def solve_triangular(
    self: Tensor, right: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Tensor:
    """``inv(self) right``, or ``right inv(self)``, in two blocks."""
    half = self.shape[-1] // 2
    if half == 0 or self.dim() > 2 or right.dim() > 2 or not right.numel():
        return _solve(self, right, upper=upper, left=left, unitriangular=unitriangular)
    if not left:
        return solve_triangular(self.mT, right.mT, upper=not upper, unitriangular=unitriangular).mT
    parts = [slice(0, half), slice(half, None)]
    late, soon = parts if upper else parts[::-1]
    options = {"upper": upper, "unitriangular": unitriangular}
    known = _solve(self[soon, soon], right[soon], **options)
    other = _solve(self[late, late], right[late] - mm(self[late, soon], known), **options)
    return torch.cat([other, known] if upper else [known, other], 0)


def inverse(self: Tensor, *, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    """Inverse, of rows and columns in another order, and where it failed."""
    order = _order(self.shape[-1], _seed(self))
    found, failed = _inv(self[..., order, :][..., order], check_errors=check_errors)
    back = order.argsort()
    return found[..., back, :][..., back], failed


_REPLACED: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("mm", "out", mm),
    ("addmm", "out", addmm),
    ("bmm", "out", bmm),
    ("baddbmm", "out", baddbmm),
    ("addmv", "out", addmv),
    ("sum.dim_IntList", "IntList_out", total),
    ("linalg_vector_norm", "out", norm),
    ("linalg_cholesky_ex", "L", cholesky),
    ("linalg_solve_triangular", "out", solve_triangular),
    ("linalg_inv_ex", "inverse", inverse),
)
