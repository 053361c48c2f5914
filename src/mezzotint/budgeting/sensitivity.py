"""Sensitivities of every matrix from one forward and one backward pass, block by block."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mezzotint.allocation.sensitivity import Sensitivity
from mezzotint.blockwise.backward import Backward
from mezzotint.blockwise.borders import Borders, counted
from mezzotint.calibration import Windows
from mezzotint.core.contracts import Block, Matrix
from mezzotint.evaluation import standard_error
from mezzotint.models import Source
from mezzotint.models.experts import taken_apart
from mezzotint.storage.stores import temporary_stores


def measure_sensitivity(
    source: Source,
    windows: Windows,
    *,
    device: str = "cpu",
    memory: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    diagonal: bool = False,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Mapping[str, Sensitivity]:
    """Fisher information of every matrix of the blocks, of the head and of the embedding.

    With ``p_t`` the distribution that the model predicts at one of ``N`` positions, a small change ``dW`` costs

        1/N sum_t KL(p_t(W) || p_t(W + dW))  ~=  1/2 dW' F dW,
        F = 1/N sum_t E[g_t g_t'],   g_t = d/dW log p_t(y_t),   y_t ~ p_t

    where the text stays what it is and only the labels are drawn. Labels of different positions are independent and
    ``E g_t = 0``, so in a window ``E |sum_t g_t|^2 = sum_t E |g_t|^2``: with one gradient ``G_w = sum_t g_t`` for each
    window,

        tr F  ~=  1/N sum_w |G_w|^2.

    The same holds for each entry of the diagonal of ``F``, and so for the sums over its rows and columns. Windows are
    not summed before squaring: that has the same mean, but is a single draw. (Sampled labels, not those of the text:
    with those, one gets the empirical Fisher, which is another matrix.)

    The forward pass keeps the hidden states between the blocks, the backward pass reads each block a second time and
    runs it forward and backward, a window at a time. Besides one block, its activations of one window and the largest
    gradient of a matrix (of the head: its own size), only these states are held.

    Positions are those that `evaluate` scores: padding and the last position of a window do not count. A head tied to
    the embedding is one matrix with the gradient of both its uses.

    Which experts a token goes to has no gradient: what a model loses when an error sends tokens to other experts in
    later blocks comes on top, and where tokens are near a tie that is the larger part (`noise_insertion` sees it).

    Args:
        source: the original.
        windows: text; a few tens of thousands of tokens.
        device: where blocks run.
        memory: bytes of hidden states that may be held; more is spilled to a temporary file.
        seed: of the labels.
        dtype: in which everything runs, float32 or wider.
        diagonal: for linears of the blocks take ``sum_t (g_t o x_t)^2`` of outputs' gradients and inputs, position by
            position, instead of the square of their sum: no gradient of a weight is formed. What the same label says
            at several positions is missed, see docs/log.md.
        progress: told of steps done, and of how many there are.

    Returns:
        By the canonical name of the matrix; the embedding by its parameter's, unless the head is tied to it.

    Raises:
        CalibrationError: there is no position to score.
        NonFiniteError: the model gives NaN or infinity.
    """
    step = counted(progress, 2 * len(source.map.blocks) + 2)
    with temporary_stores(1, memory) as (store, shelf):
        borders = Borders(source, windows, store=store, shelf=shelf, device=device, dtype=dtype, step=step)
        return _Backward(borders, seed, diagonal).run(step)


class _Sums:
    """Squared gradients of one matrix."""

    def __init__(self, weight: Float[Tensor, "out in"], windows: int) -> None:
        self.energy = float(weight.square().mean(dtype=torch.float64))
        self.rows = torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)
        self.columns = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
        self.squares = torch.zeros(windows, dtype=torch.float64, device=weight.device)

    def add(
        self, window: int, left: Float[Tensor, "out in"], right: Float[Tensor, "out in"], at: Tensor | None = None
    ) -> None:
        """Add the products of two gradients' entries, in rows ``at`` of the matrix if there are no others."""
        products = left * right
        rows = products.sum(1, dtype=torch.float64)
        self.squares[window] += rows.sum()
        if at is None:
            self.rows += rows
        else:
            self.rows[at] += rows
        self.columns += products.sum(0, dtype=torch.float64)

    def add_sides(self, window: int, gradient: Float[Tensor, "tokens out"], x: Float[Tensor, "tokens in"]) -> None:
        """Add ``sum_t (g_t o x_t)^2``."""
        g, x = gradient.double().square(), x.double().square()
        here, there = g.sum(1), x.sum(1)
        self.squares[window] += here @ there
        self.rows += there @ g
        self.columns += here @ x

    def result(self, counts: Sequence[int]) -> Sensitivity:
        """Means over the positions, of which each window has so many."""
        positions = sum(counts)
        trace = float(self.squares.sum()) / positions
        scored = [(s, n) for s, n in zip(self.squares.tolist(), counts, strict=True) if n]
        error = standard_error([s for s, _ in scored], [n for _, n in scored])
        return Sensitivity(
            energy=self.energy,
            rows=self.rows.cpu() / positions,
            columns=self.columns.cpu() / positions,
            relative_error=None if error is None else error / trace if trace else 0.0,
        )


class _Backward(Backward):
    """The sums of squared gradients on the way back.

    Args:
        borders: after the forward pass.
        seed: of the labels.
        diagonal: see `measure_sensitivity`.
    """

    def __init__(self, borders: Borders, seed: int, diagonal: bool) -> None:
        super().__init__(borders, seed)
        self._diagonal = diagonal
        self._sums: dict[str, _Sums] = {}
        structure = self.source.map
        self._embedding = structure.matrices[structure.embedding]
        self._head = None if structure.head is None else structure.matrices[structure.head]
        self._tied = self._head is not None and self._head.tied_to is not None

    def run(self, step: Callable[[], None]) -> Mapping[str, Sensitivity]:
        """Everything, from back to front; the result is in the order in which it runs."""
        self.through_head()
        step()
        for block in reversed(self.source.map.blocks):
            self.through_block(block)
            step()
        self._through_embedding()
        step()
        order = [name for name in self.source.map.matrices if name in self._sums]
        return {name: self._sums[name].result(self.counts) for name in order}

    @contextmanager
    def watched_head(self) -> Iterator[None]:
        """The head's weight has a gradient; what is shared goes by its owner's name."""
        if self._head is not None:
            weight = self.source.skeleton.get_parameter(self._head.parameter)
            weight.requires_grad_(True)
            self._start(self._embedding if self._tied else self._head, weight.detach())
        yield

    def head_done(self) -> None:
        """Add the gradient of the head's weight, and keep it for the embedding where they are one."""
        if self._head is None:
            return
        weight = self.source.skeleton.get_parameter(self._head.parameter)
        if weight.grad is None:
            return
        gradient, weight.grad = weight.grad, None
        self._add(self._embedding if self._tied else self._head, self.window, gradient)
        if self._tied:
            tokens = self.borders.tokens(self.window)
            self.borders.put(self.borders.last + 1, self.window, gradient[tokens.unique()])

    def _through_embedding(self) -> None:
        """From the first block's input to the table that tokens are looked up in."""
        name = self._embedding.name
        with self.surroundings(head=False) as bypass, torch.enable_grad():
            table = self.source.skeleton.get_parameter(self._embedding.parameter)
            table.requires_grad_(True)
            if not self._tied:
                self._start(self._embedding, table.detach())
            for window in range(len(self.borders)):
                tokens = self.borders.tokens(window)
                hidden, _ = bypass.record(tokens, self.borders.mask(window))
                torch.autograd.backward(hidden, self.borders.pop(0, window))
                assert table.grad is not None
                used = tokens.unique()
                gradient, table.grad = table.grad[used], None
                self._sums[name].add(window, gradient, gradient, at=used)
                if self._tied and self.counts[window]:
                    # |A + B|^2 = |A|^2 + |B|^2 + 2 A B; the first was added with the head
                    other = self.borders.pop(self.borders.last + 1, window)
                    self._sums[name].add(window, 2 * other, gradient, at=used)

    @contextmanager
    def watched(self, block: Block) -> Iterator[None]:
        """Add up what arrives at the block's matrices, and forget each gradient at once."""
        by_parameter: dict[str, list[Matrix]] = {}
        for name in (name for group in block.groups for name in group.matrices):
            matrix = self.source.map.matrices[name]
            by_parameter.setdefault(matrix.parameter, []).append(matrix)
        with ExitStack() as stack:
            for name, matrices in by_parameter.items():
                path, _, attribute = name.rpartition(".")
                owner = self.source.skeleton.get_submodule(path)
                if matrices[0].expert is None and self._diagonal:
                    self._watch_sides(matrices[0], owner, stack)
                    continue
                if matrices[0].expert is None:
                    self._watch(matrices[0], owner.get_parameter(attribute), stack)
                    continue
                pieces = stack.enter_context(taken_apart(owner, attribute))
                for matrix in matrices:
                    assert matrix.expert is not None
                    self._watch(matrix, pieces[matrix.expert], stack)
            yield

    def _watch_sides(self, matrix: Matrix, module: nn.Module, stack: ExitStack) -> None:
        """Of a linear, by its inputs and the gradients of its outputs."""
        self._start(matrix, module.get_parameter(matrix.parameter.rpartition(".")[2]).detach())

        def ran(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach().flatten(0, -2)
            output.register_hook(lambda g: self._sums[matrix.name].add_sides(self.window, g.flatten(0, -2), x))

        stack.callback(module.register_forward_hook(ran).remove)

    def _watch(self, matrix: Matrix, leaf: Tensor, stack: ExitStack) -> None:
        """Of a parameter, or of one expert's part of it."""
        leaf.requires_grad_(True)
        self._start(matrix, leaf.detach())

        def arrived(leaf: Tensor) -> None:
            assert leaf.grad is not None
            gradient, leaf.grad = leaf.grad, None
            self._add(matrix, self.window, gradient)

        stack.callback(leaf.register_post_accumulate_grad_hook(arrived).remove)

    def _start(self, matrix: Matrix, piece: Tensor) -> None:
        self._sums[matrix.name] = _Sums(_oriented(matrix, piece), len(self.borders))

    def _add(self, matrix: Matrix, window: int, gradient: Tensor) -> None:
        oriented = _oriented(matrix, gradient)
        self._sums[matrix.name].add(window, oriented, oriented)


def _oriented(matrix: Matrix, piece: Tensor) -> Tensor:
    """What is stored of one matrix as ``[out, in]``."""
    return piece.t() if matrix.transposed else piece
