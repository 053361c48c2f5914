"""A tiny random Llama, its map by hand, and its folder in a format: without our models and pipeline."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mezzotint.core.contracts import QuantizedWeight
from mezzotint.core.plans import Entry, Format, Plan, TensorSpec
from mezzotint.core.structure import Block, Matrix, ModelMap
from mezzotint.grids.uniform import UniformGrid
from mezzotint.rounding.nearest import Nearest
from mezzotint.storage.files import write_json
from mezzotint.storage.shards import ShardWriter
from mezzotint.targets.weight import WeightTarget

CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=96,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
)
FUSION = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
Choice = Callable[[Matrix], UniformGrid | None]


UNIFORM = UniformGrid(bits=4, group_size=32, symmetric=True, range="minmax", scale_dtype="float32")


def make_llama(config: LlamaConfig = CONFIG, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def block_of(name: str) -> int | None:
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def map_of(model: LlamaForCausalLM) -> ModelMap:
    matrices = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            last = name.rpartition(".")[2]
            matrices[name] = Matrix(
                name=name,
                parameter=f"{name}.weight",
                sources=(f"{name}.weight",),
                shape=(module.out_features, module.in_features),
                fusion=f"{block_of(name)}.{FUSION.get(last, last)}",
            )
    blocks = tuple(
        Block(index=i, path=f"model.layers.{i}", groups=(), roles=(), kind="full_attention")
        for i in range(model.config.num_hidden_layers)
    )
    return ModelMap(
        blocks=blocks,
        matrices=matrices,
        embedding="model.embed_tokens",
        head="lm_head",
        final_norm=None,
        parallel_residual=False,
    )


def grids_of(
    model: ModelMap, changes: dict[str, dict[str, object]], base: UniformGrid = UNIFORM
) -> dict[str, UniformGrid]:
    """The base for every linear of the blocks, changed where a part of the name is a key."""
    grids = dict.fromkeys([name for name in model.matrices if name != "lm_head"], base)
    for part, settings in changes.items():
        grids |= {name: replace(grids[name], **settings) for name in grids if part in name}
    return grids


def plan_of(grids: Mapping[str, UniformGrid], model: ModelMap, form: Format, engine: str | None = None) -> Plan:
    entries = tuple(entry_of(grid, model.matrices[name]) for name, grid in grids.items())
    kept = {name: "kept by the test" for name in model.matrices if name not in grids}
    return Plan(
        entries=entries,
        kept=kept,
        format=form.name,
        engine=engine,
        bytes=0,
        peak_memory_bytes=0,
        fingerprint="",
    )


def entry_of(grid: UniformGrid, matrix: Matrix) -> Entry:
    return Entry(
        matrix=matrix.name,
        block=block_of(matrix.name),
        target=WeightTarget(),
        transform=None,
        grid=grid,
        rounding=Nearest(),
        bits=grid.stored_bits(matrix.shape),
        refinement=None,
        because="test",
    )


def nearest(weight: Tensor, grid: UniformGrid) -> QuantizedWeight:
    fitted = grid.fit(weight.float(), None)
    return QuantizedWeight(shape=tuple(weight.shape), code=fitted.encode(weight.float()), grid=fitted)


def write_folder(
    model: LlamaForCausalLM, choose: Choice, form: Format, folder: Path, *, shard_bytes: int | float = 5e9
) -> dict[str, QuantizedWeight]:
    """Round every matrix that ``choose`` gives a grid for, write the folder, give the weights by matrix name."""
    structure, state, dtype = map_of(model), model.state_dict(), model.dtype
    chosen = {name: choose(matrix) for name, matrix in structure.matrices.items()}
    grids = {name: grid.resolve(structure.matrices[name].shape, dtype) for name, grid in chosen.items() if grid}
    plan = plan_of(grids, structure, form)
    for entry in plan.entries:
        assert form.refuses(entry, structure.matrices[entry.matrix]) is None
    assert form.refuses_plan(plan, structure) == ()
    weights = {name: nearest(state[f"{name}.weight"], grid) for name, grid in grids.items()}

    replaced = {f"{name}.weight" for name in grids}
    specs = [TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in state.items() if n not in replaced]
    for name, grid in grids.items():
        specs.extend(form.specs(structure.matrices[name], grid, dtype))
    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(folder, specs, shard_bytes=shard_bytes) as writer:
        for name, weight in weights.items():
            for key, value in form.tensors(structure.matrices[name], weight, dtype).items():
                writer.put(key, value)
        for name in writer.missing:
            writer.put(name, state[name])

    config = json.loads(model.config.to_json_string())
    quantization = form.config(plan, structure)
    write_json(folder / "config.json", config | ({"quantization_config": dict(quantization)} if quantization else {}))
    return weights


def fill(model: LlamaForCausalLM, weights: Mapping[str, QuantizedWeight]) -> LlamaForCausalLM:
    """The twin: the same model with the values that the codes stand for."""
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_submodule(name).weight.copy_(weight.dense(model.dtype))
    return model
