"""Shapes are checked while the tests run, wherever one is named."""

import ast

import pytest
import torch
from jaxtyping import TypeCheckError

import shapes
from mezzotint.core.linalg import inverse_cholesky_upper
from mezzotint.core.metrics import h_error
from mezzotint.transforms.awq import ScaleBasis


def test_wrong_shapes_stop_a_test() -> None:
    with pytest.raises(TypeCheckError, match="gram"):
        inverse_cholesky_upper(torch.eye(3)[:2], damping=0.0)
    with pytest.raises(TypeCheckError, match="gram"):
        inverse_cholesky_upper(torch.eye(3, dtype=torch.int64), damping=0.0)
    with pytest.raises(TypeCheckError, match="value"):  # one name, two lengths
        h_error(torch.ones(2, 3), torch.ones(2, 4), torch.eye(3))
    with pytest.raises(TypeCheckError, match="scale"):  # a field of a dataclass
        ScaleBasis(scale=torch.ones(2, 3), strength=1.0)


def checked(source: str) -> list[str]:
    """What of a module is given a check."""
    tree = shapes.with_checks(ast.parse(source))
    defined = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return sorted(node.name for node in defined if any("beartype" in ast.unparse(d) for d in node.decorator_list))


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("def f(x: Float[Tensor, 'n']): ...", ["f"]),
        ("def f() -> Mapping[str, Float[Tensor, 'n']] | None: ...", ["f"]),
        ("def f(*, x: Tensor, **more: Float[Tensor, 'n']): ...", ["f"]),
        ("def f(x: Tensor, n: int) -> float: ...", []),
        ("def _f(x: Float[Tensor, 'n']): ...", []),
        ("def __add__(x: Float[Tensor, 'n']): ...", ["__add__"]),
        ("class C:\n    @property\n    def f(self) -> Float[Tensor, 'n']: ...", ["f"]),
        ("@dataclass\nclass C:\n    x: Float[Tensor, 'n']\n    def f(self) -> int: ...", ["C"]),
        ("Pair = tuple[Float[Tensor, 'n'], int]\ndef f(x: Pair | None = None): ...", ["f"]),
        ("def f():\n    def g(x: Float[Tensor, 'n']): ...", ["g"]),
    ],
)
def test_whatever_names_a_shape_is_checked(source: str, names: list[str]) -> None:
    assert checked(f"from jaxtyping import Float\n{source}") == names
