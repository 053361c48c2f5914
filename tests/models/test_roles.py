"""Roles and norm edges mean what they say: seen from what the model computes."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mezzotint.core.contracts import Matrix, NormEdge, Role
from mezzotint.errors import ModelError
from mezzotint.models import Source, open_model
from mezzotint.models.skeleton import materialize
from mezzotint.testing.models import TINY, VOCABULARY

Folder = Callable[[str], Path]
IDS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def filled(tiny_folder: Folder) -> Callable[[str], Source]:
    def fill(name: str) -> Source:
        source = open_model(tiny_folder(name))
        materialize(source.skeleton, "", source.checkpoint, dtype=torch.float32, device="cpu")
        return source

    return fill


def rows(source: Source, role: Role) -> tuple[Matrix, Tensor]:
    matrix = source.map.matrices[role.matrix]
    return matrix, torch.arange(matrix.shape[0]) if role.rows is None else role.rows()


@contextlib.contextmanager
def scaled_rows(source: Source, role: Role, factor: float, index: Tensor | None = None) -> Iterator[None]:
    """The rows of a role, and their biases, multiplied by ``factor`` for a while."""
    matrix, own = rows(source, role)
    own = own if index is None else own[index]
    weight = source.skeleton.get_parameter(matrix.parameter)
    bias = None if matrix.bias is None else source.skeleton.get_parameter(matrix.bias)
    before = weight.clone(), None if bias is None else bias.clone()
    with torch.no_grad():
        matrix.view(weight)[own] *= factor
        if bias is not None:
            (bias if matrix.expert is None else bias[matrix.expert])[own] *= factor
        yield
        weight.copy_(before[0])
        if bias is not None and before[1] is not None:
            bias.copy_(before[1])


def input_of(source: Source, name: str) -> Tensor:
    """What reaches the linear ``name`` in a forward pass."""
    seen: list[Tensor] = []
    hook = source.skeleton.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    with torch.no_grad():
        source.skeleton(input_ids=IDS)
    hook.remove()
    return seen[0]


def roles(source: Source, block: int = 0) -> dict[str, Role]:
    return {role.kind: role for role in source.map.blocks[block].roles}


@pytest.mark.parametrize("name", TINY)
def test_every_block_has_its_roles(name: str, filled: Callable[[str], Source]) -> None:
    expected = {"q", "k", "v", "o", "up", "down"}
    if name not in {"opt", "gpt_neox", "gpt2", "falcon_multi_query", "falcon_new_decoder"}:
        expected |= {"gate"}
    source = filled(name)
    for block in range(len(source.map.blocks)):
        assert set(roles(source, block)) == expected
    found = roles(source)
    sizes = [len(rows(source, found[kind])[1]) for kind in ("q", "k", "v")]
    width = found["q"].head_dim
    assert width is not None
    assert sizes == [4 * width, *[{"falcon_multi_query": 1}.get(name, kv_heads(name)) * width] * 2]


def kv_heads(name: str) -> int:
    return 4 if name in {"opt", "gpt_neox", "gpt2"} else 2


@pytest.mark.parametrize("name", TINY)
def test_rows_of_attention(name: str, filled: Callable[[str], Source]) -> None:
    """Without v nothing comes out of attention; without q or without k every visible token counts the same."""
    source = filled(name)
    found = roles(source)
    out = found["o"].matrix
    usual = input_of(source, out)
    with scaled_rows(source, found["v"], 0.0):
        assert torch.count_nonzero(input_of(source, out)) == 0
    if name in {"qwen3", "qwen3_moe", "gemma3", "olmo2"}:
        return  # q and k are normalised: only their absence would be seen, not their place
    with scaled_rows(source, found["q"], 0.0):
        without_q = input_of(source, out)
    with scaled_rows(source, found["k"], 0.0):
        without_k = input_of(source, out)
    torch.testing.assert_close(without_q, without_k, rtol=1e-5, atol=1e-6)  # sums of 12 numbers of order one in float32
    assert (without_q - usual).abs().max() > 1e-2


@pytest.mark.parametrize("name", [name for name in TINY if name != "olmo2"])  # there q is normalised over all heads
def test_rows_of_one_query_head(name: str, filled: Callable[[str], Source]) -> None:
    """A head of q changes its own columns of the input of o, and no others."""
    source = filled(name)
    found = roles(source)
    width = found["q"].head_dim
    assert width is not None
    usual = input_of(source, found["o"].matrix)
    with scaled_rows(source, found["q"], -1.0, torch.arange(2 * width, 3 * width)):
        changed = (input_of(source, found["o"].matrix) != usual).any(0).any(0)
    assert changed[2 * width : 3 * width].all()
    assert changed.sum() == width


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma3", "qwen3"])
def test_rows_of_gate_and_up(name: str, filled: Callable[[str], Source]) -> None:
    """The product is linear in up and not in gate."""
    source = filled(name)
    found = roles(source)
    usual = input_of(source, found["down"].matrix)
    with scaled_rows(source, found["up"], 2.0):
        torch.testing.assert_close(input_of(source, found["down"].matrix), 2 * usual, rtol=0, atol=0)
    with scaled_rows(source, found["gate"], 2.0):
        assert (input_of(source, found["down"].matrix) - 2 * usual).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_rows_of_gate_and_up_in_experts(name: str, filled: Callable[[str], Source]) -> None:
    source = filled(name)
    experts = source.skeleton.get_submodule(f"{source.map.blocks[0].path}.mlp.experts")
    found = [role for role in source.map.blocks[0].roles if role.matrix.endswith("gate_up_proj[1]")]
    assert [role.kind for role in found] == ["gate", "up"]
    matrix = source.map.matrices[found[0].matrix]
    x = torch.randn(3, matrix.shape[1], generator=torch.Generator().manual_seed(0))

    def gated(factor: float, role: Role) -> Tensor:
        with scaled_rows(source, role, factor):
            weight = matrix.view(source.skeleton.get_parameter(matrix.parameter))
            bias = 0.0 if matrix.bias is None else source.skeleton.get_parameter(matrix.bias)[1]
            return experts._apply_gate(x @ weight.T + bias)

    assert torch.count_nonzero(gated(0.0, found[0])) == 0
    usual = gated(1.0, found[1])
    # gpt-oss adds one to up before it multiplies; none of its values is large enough to be clamped
    expected = 2 * usual - (gated(0.0, found[1]) if name == "gpt_oss" else 0)
    torch.testing.assert_close(gated(2.0, found[1]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TINY)
def test_scales_fold_into_norms(name: str, filled: Callable[[str], Source]) -> None:
    """Scales moved from the columns of everything that reads a norm into its gain leave the logits alone."""
    source = filled(name)
    with torch.no_grad():
        before = source.skeleton(input_ids=IDS).logits
        generator = torch.Generator().manual_seed(2)
        edges: dict[str, tuple[NormEdge, list[str]]] = {}
        for group in (g for block in source.map.blocks for g in block.groups if g.norm is not None):
            assert group.norm is not None
            edges.setdefault(group.norm.parameter, (group.norm, []))[1].extend(group.matrices)
        for parameter, (edge, readers) in edges.items():
            gain = source.skeleton.get_parameter(parameter)
            scale = torch.rand(gain.shape, generator=generator) + 0.5
            gain.copy_((1 + gain) * scale - 1 if edge.gain == "1+w" else gain * scale)
            if edge.has_bias:
                source.skeleton.get_parameter(parameter.replace("weight", "bias")).mul_(scale)
            views = [
                source.map.matrices[n].view(source.skeleton.get_parameter(source.map.matrices[n].parameter))
                for n in readers
            ]
            if any(source.map.matrices[n].expert is not None for n in readers):  # the router reads it as well
                block = parameter.rpartition(".")[0].rpartition(".")[0]
                router = "router" if name == "gpt_oss" else "gate"
                views.append(source.skeleton.get_parameter(f"{block}.mlp.{router}.weight"))
            for view in views:
                view /= scale
        after = source.skeleton(input_ids=IDS).logits
    assert edges or name == "olmo2"
    # float32 through at most four blocks, logits of order one to ten
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def renamed(folder: Path, out: Path, names: dict[str, str]) -> Path:
    """The model with names of roles of its own in config.json."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps({**config, "mezzotint_roles": names}), encoding="utf-8")
    return out


def test_a_configuration_brings_names_of_its_own(tiny_folder: Folder, tmp_path: Path) -> None:
    """The longest end of a name wins, among those that are known too."""
    folder = renamed(tiny_folder("llama"), tmp_path / "own", {"mlp.up_proj": "gate", "mlp.gate_proj": "up"})
    usual, own = roles(open_model(tiny_folder("llama"))), roles(open_model(folder))
    assert (own["gate"].matrix, own["up"].matrix) == (usual["up"].matrix, usual["gate"].matrix)
    assert own["down"].matrix == usual["down"].matrix


def test_names_that_do_not_fit_the_shapes_are_not_believed(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = renamed(tiny_folder("llama"), tmp_path / "own", {"q_proj": "k", "k_proj": "q"})
    assert roles(open_model(folder)).keys() == {"gate", "up", "down"}


def test_a_role_that_there_is_not_is_refused(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = renamed(tiny_folder("llama"), tmp_path / "own", {"q_proj": "query"})
    with pytest.raises(ModelError, match=r"mezzotint_roles .*'q_proj': unknown role 'query'.*Known"):
        open_model(folder)
