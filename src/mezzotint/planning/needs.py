"""Statistics that a group's inputs need. The memory plan and the sweep both use it."""

from collections import Counter
from collections.abc import Mapping, Sequence

from mezzotint.core import panels
from mezzotint.core.contracts import Matrix
from mezzotint.core.plans import Entry


def drifts_by_output(members: Sequence[Entry], matrices: Mapping[str, Matrix], *, filed: bool) -> bool:
    """Whether of a group's matrices products with the drift are summed, in the place of the drift.

    With ``m`` rows and ``n`` columns that takes ``2 m n`` products a token and ``m n`` sums where the drift takes
    ``n n``: for a down projection with ``n = 3.5 m`` four sevenths of the time and two sevenths of the memory. It
    cannot be done where several matrices read the inputs, where a rounding works on the drift itself, or where weights
    have changed when it is summed again.

    Args:
        members: those of the group that are quantized.
        matrices: of the model.
        filed: wide squares lie in files, where they take less memory than the product would.
    """
    own = [matrices[entry.matrix] for entry in members]
    return (
        max(Counter(matrix.expert for matrix in own).values(), default=2) == 1
        and all(2 * matrix.shape[0] <= matrix.shape[1] for matrix in own)
        and not any("drift" in entry.rounding.needs or entry.submodules is not None for entry in members)
        and not (filed and any(panels.is_wide(matrix.shape[1]) for matrix in own))
    )
