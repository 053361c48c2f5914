"""An architecture that transformers does not have: what is found out about it, and what has to be said.

Blocks, matrices, what shares an input, and norms that feed it are seen in a forward pass without data, whatever their
names. Only the roles of matrices go by names; a configuration can bring its own, see ``mezzotint_roles``.

The model is a decoder with names of its own, filled with the weights of a Llama.

    python examples/new_architecture.py LLAMA CALIBRATION.txt OTHER.txt OUT
"""

import sys
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mezzotint
from mezzotint.models import open_model

ROLES = {"query": "q", "key": "k", "value": "v", "merge": "o", "switch": "gate", "widen": "up", "narrow": "down"}


class PlateConfig(PreTrainedConfig):
    """What makes a plate. ``mezzotint_roles`` may stand here or in a model's config.json."""

    model_type = "plate"
    mezzotint_roles: ClassVar[dict[str, str]] = {}
    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 3
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    max_position_embeddings: int = 512


class Attention(nn.Module):
    """Grouped heads with rotary positions."""

    def __init__(self, config: PlateConfig) -> None:
        super().__init__()
        self.config, self.head_dim = config, config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        keys = config.num_key_value_heads * self.head_dim
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.key = nn.Linear(config.hidden_size, keys, bias=False)
        self.value = nn.Linear(config.hidden_size, keys, bias=False)
        self.merge = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, angle: Tensor, mask: Tensor | None) -> Tensor:
        """What is added to the stream; angles are ``[tokens, head_dim / 2]``."""

        def turn(x: Tensor) -> Tensor:
            a, b = x.chunk(2, dim=-1)
            return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1).to(x)

        query, key, value = (
            linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        # through transformers' interface LPCD can see the heads
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]  # noqa: SLF001 (transformers' own way)
        return self.merge(attend(self, turn(query), turn(key), value, mask)[0].flatten(2))


class Block(nn.Module):
    """Attention, and an MLP with a gate."""

    def __init__(self, config: PlateConfig) -> None:
        super().__init__()
        self.before = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.attention = Attention(config)
        self.between = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.switch = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.widen = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.narrow = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, angle: Tensor, mask: Tensor | None) -> Tensor:
        """The stream behind the block."""
        x = x + self.attention(self.before(x), angle, mask)
        y = self.between(x)
        return x + self.narrow(functional.silu(self.switch(y)) * self.widen(y))


class PlateForCausalLM(PreTrainedModel):
    """A decoder as transformers wants one: it takes token ids and gives logits."""

    config_class = PlateConfig
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: PlateConfig) -> None:
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.after = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        """Logits of every token."""
        x, half = self.tokens(input_ids), self.blocks[0].attention.head_dim // 2
        places = torch.arange(x.shape[1], device=x.device)
        angle = places[:, None] * 10000.0 ** (-torch.arange(half, device=x.device) / half)
        mask = create_causal_mask(
            self.config, x, attention_mask, past_key_values=None, position_ids=places[None].expand(len(x), -1)
        )
        for block in self.blocks:
            x = block(x, angle, mask)
        return CausalLMOutput(logits=self.head(self.after(x)))


NAMES = {
    "model.embed_tokens": "tokens",
    "model.layers": "blocks",
    "model.norm": "after",
    "lm_head": "head",
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.merge",
    "mlp.gate_proj": "switch",
    "mlp.up_proj": "widen",
    "mlp.down_proj": "narrow",
    "input_layernorm": "before",
    "post_attention_layernorm": "between",
}


def make(llama: str, folder: str) -> None:
    """Save a plate that computes what a Llama does."""
    original = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    more = ("num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    config = PlateConfig(**{name: getattr(original.config, name) for name in (*names, *more)})
    weights = {}
    for name, value in original.state_dict().items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        weights[name] = value
    plate = PlateForCausalLM(config).to(torch.bfloat16)
    plate.load_state_dict(weights)
    plate.save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)


if __name__ == "__main__":
    llama, calibration, other, out = sys.argv[1:]
    AutoConfig.register("plate", PlateConfig)
    AutoModelForCausalLM.register(PlateConfig, PlateForCausalLM)
    make(llama, f"{out}-plate")
    options = {"bits": 3, "calibration": calibration, "samples": 32, "seqlen": 128}

    for roles in ({}, ROLES):
        PlateConfig.mezzotint_roles = roles
        block = open_model(f"{out}-plate").map.blocks[0]
        print(f"{block.path}, told {len(roles)} names:")
        known = {role.matrix: role.kind for role in block.roles}
        for group in block.groups:
            members = ", ".join(f"{name.rpartition('.')[2]} ({known.get(name, '?')})" for name in group.matrices)
            print(f"  {members} read {'the output of ' + group.norm.parameter if group.norm else 'something else'}")
        planned = mezzotint.plan(f"{out}-plate", "lpcd-gptq", **options)
        for step in planned.steps_down:
            print(f"  stepped down: {step.what}: {step.why}")
        if not planned.steps_down:
            print("  lpcd-gptq is planned as it is")

    for name, model in (("plate", f"{out}-plate"), ("llama", llama)):
        mezzotint.quantize(model, "qep-gptq", out=f"{out}-{name}-3bit", **options)
        result = mezzotint.evaluate(f"{out}-{name}-3bit", other, against=model, seqlen=64, windows=8)
        print(f"{name}: perplexity {result.reference_perplexity:.3f}, KL {result.kl_nats:.4f}")
