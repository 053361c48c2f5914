"""GGUF files: what is written is read back, by the gguf package and by us, and damage is noticed."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from formats.make_gguf_golden import GOLDEN, TYPES
from formats.models_for_gguf import CONFIGS, LLAMA3, TOKENIZER, make_model, write_file
from mezzotint.errors import FormatError
from mezzotint.formats.gguf import model as gguf_model
from mezzotint.formats.gguf import tokens as gguf_tokens
from mezzotint.formats.gguf.file import GgufFile
from mezzotint.formats.gguf.format import FILE, export, stored_tensors
from mezzotint.grids.gguf.grid import GgufGrid

every_model = pytest.mark.parametrize("name", CONFIGS)


def in_file_order(value, heads):
    """Rows of a head: one of the first half, one of the second, in turn."""
    rows = value.shape[0] // heads
    order = [h * rows + s * rows // 2 + i for h in range(heads) for i in range(rows // 2) for s in (0, 1)]
    return value[order]


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    model = make_model(CONFIGS["llama"]())
    return folder, model, write_file(model, "Q4_K", folder)


@every_model
def test_every_tensor_comes_back(name, tmp_path):
    model = make_model(CONFIGS[name]())
    weights = write_file(model, "Q5_1", tmp_path)
    found = stored_tensors(tmp_path / FILE, model.config.to_dict())
    tied = model.config.tie_word_embeddings
    state = {n: v for n, v in model.state_dict().items() if not (tied and n == "lm_head.weight")}
    assert found.keys() == state.keys()
    for parameter, value in state.items():
        shape, read = found[parameter].shape, found[parameter].dense
        assert shape == tuple(value.shape)
        matrix = parameter.removesuffix(".weight")
        if matrix in weights and parameter.endswith(".weight"):
            torch.testing.assert_close(read(), weights[matrix].dense(), rtol=0, atol=0)
            again = found[parameter].weight()
            torch.testing.assert_close(again.code, weights[matrix].code, rtol=0, atol=0)
            torch.testing.assert_close(
                dict(again.grid.parameters), dict(weights[matrix].grid.parameters), rtol=0, atol=0
            )
        elif value.ndim == 1:
            # Gemma's norms are stored with one added: one rounding at 1
            torch.testing.assert_close(read(), value, rtol=0, atol=2e-7 if "gemma" in name else 0)
        else:
            kind = {"embed_tokens": "Q8_0" if tied else "Q5_1", "lm_head": "Q8_0"}[matrix.rpartition(".")[2]]
            grid = GgufGrid(type=kind, range="error").fit(value, None)
            torch.testing.assert_close(read(), grid.decode(grid.encode(value)), rtol=0, atol=0)


@every_model
def test_the_package_reads_the_file(name, tmp_path):
    model = make_model(CONFIGS[name]())
    weights = write_file(model, "Q4_0", tmp_path)
    reader = gguf.GGUFReader(tmp_path / FILE)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    permuted = name.startswith(("llama", "mistral"))
    for matrix, weight in weights.items():
        block, kind = matrix.split(".")[2], matrix.rpartition(".")[2]
        new = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
        new |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
        new |= {"qkv_proj": "attn_qkv", "gate_up_proj": "ffn_up"}
        tensor = tensors.pop(f"blk.{block}.{new[kind]}.weight")
        expected = weight.dense()
        if permuted and kind in ("q_proj", "k_proj"):
            expected = in_file_order(expected, {"q_proj": 4, "k_proj": 2}[kind])
        assert tensor.tensor_type.name == "Q4_0"
        np.testing.assert_array_equal(gguf.dequantize(tensor.data, tensor.tensor_type), expected.numpy())
    assert {t.tensor_type.name for t in tensors.values() if len(t.shape) == 1} == {"F32"}
    arch = gguf_model.architecture_of(model.config.to_dict()).name
    assert reader.get_field("general.architecture").contents() == arch
    assert reader.get_field(f"{arch}.attention.key_length").contents() == model.config.head_dim
    assert reader.get_field("tokenizer.ggml.tokens").contents()[:3] == ["<pad>", "<s>", "</s>"]


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_the_chat_template_is_in_the_file(place, tmp_path):
    model = make_model(CONFIGS["llama"]())
    write_file(model, "Q4_0", tmp_path)  # tokenizer
    template = "{% for message in messages %}<s>{{ message.content }}{% endfor %}"
    text = template
    if place.endswith(".json"):
        text = json.dumps(json.loads((tmp_path / place).read_text()) | {"chat_template": template})
    (tmp_path / place).write_text(text)
    model.save_pretrained(tmp_path)
    export(tmp_path, tmp_path / FILE, model.config.to_dict(), {}, tables=False)
    assert gguf.GGUFReader(tmp_path / FILE).get_field("tokenizer.chat_template").contents() == template


def test_frequencies_of_llama_3(tmp_path):
    config = CONFIGS["llama 3 rope"]().to_dict()
    (factors,) = gguf_model.extra_tensors(config).values()
    expected = []
    for i in range(0, 32, 2):
        wavelength = 2 * np.pi * 10000.0 ** (i / 32)
        if wavelength < 32 / LLAMA3["high_freq_factor"]:
            expected.append(1.0)
        elif wavelength > 32 / LLAMA3["low_freq_factor"]:
            expected.append(8.0)
        else:
            smooth = (32 / wavelength - 1) / 3
            expected.append(1 / ((1 - smooth) / 8 + smooth))
    np.testing.assert_allclose(factors.numpy(), expected, rtol=1e-6)


# ---- golden file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TYPES)
def test_golden_blocks(name):
    file = GgufFile.open(GOLDEN / "types.gguf")
    tensor = f"blk.0.{name.lower()}.weight"
    expected = load_file(GOLDEN / "types.safetensors")[tensor]
    stored = file.read(tensor)
    code, grid = GgufGrid(type=name).restore(file.tensors[tensor].shape, {"blocks": stored})
    torch.testing.assert_close(grid.decode(code), expected, rtol=0, atol=0)
    torch.testing.assert_close(grid.store(code, grid.shape)["blocks"], stored, rtol=0, atol=0)


# ---- damage ---------------------------------------------------------------------------------------------------------


def read_all(path, config):
    for stored in stored_tensors(path, config).values():
        stored.dense()


def test_a_flipped_bit_of_any_tensor_is_noticed(llama_file, tmp_path):
    folder, model, _ = llama_file
    data, config = bytearray((folder / FILE).read_bytes()), model.config.to_dict()
    random = np.random.default_rng(0)
    damaged = tmp_path / FILE
    for tensor in GgufFile.open(folder / FILE).tensors.values():
        place = tensor.offset + int(random.integers(tensor.nbytes))
        data[place] ^= 1 << int(random.integers(8))
        damaged.write_bytes(data)
        with pytest.raises(FormatError, match=rf"damaged.*{tensor.name}.*download"):
            read_all(damaged, config)
        data[place] = (folder / FILE).read_bytes()[place]


def test_a_flipped_bit_of_the_header_is_noticed(llama_file, tmp_path):
    folder, model, _ = llama_file
    data, config = (folder / FILE).read_bytes(), model.config.to_dict()
    start = GgufFile.open(folder / FILE).data_start
    random = np.random.default_rng(0)
    damaged = tmp_path / FILE
    key = data.index(b"mezzotint.checksums")
    for place in [*range(40), *range(key - 8, key + 40), *random.integers(start, size=60).tolist()]:
        changed = bytearray(data)
        changed[place] ^= 1 << int(random.integers(8))
        damaged.write_bytes(changed)
        with pytest.raises(FormatError):
            read_all(damaged, config)


def test_a_file_cut_short_is_noticed(llama_file, tmp_path):
    folder, model, _ = llama_file
    data, config = (folder / FILE).read_bytes(), model.config.to_dict()
    file = GgufFile.open(folder / FILE)
    cut = tmp_path / FILE
    for length in np.linspace(0, file.data_start - 1, 20).astype(int).tolist():
        cut.write_bytes(data[:length])
        with pytest.raises(FormatError, match=r"truncated|damaged"):
            read_all(cut, config)
    last = max(file.tensors.values(), key=lambda tensor: tensor.offset)
    cut.write_bytes(data[: last.offset + last.nbytes - 1])
    with pytest.raises(FormatError, match=rf"truncated: tensor '{last.name}'"):
        read_all(cut, config)


def test_files_of_others_are_refused(llama_file, tmp_path):
    folder, model, _ = llama_file
    other = make_model(CONFIGS["qwen2"]()).config.to_dict()
    with pytest.raises(FormatError, match=r"architecture 'llama'.*'qwen2'"):
        stored_tensors(folder / FILE, other)
    with pytest.raises(FormatError, match="not made by mezzotint, or is damaged"):
        stored_tensors(GOLDEN / "types.gguf", model.config.to_dict())
    (tmp_path / FILE).write_bytes(b"safetensors")
    with pytest.raises(FormatError, match="not a GGUF file"):
        stored_tensors(tmp_path / FILE, model.config.to_dict())


# ---- what has no counterpart ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba"}, r"not for model_type 'mamba'"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 64}, r"head width 32.*query_pre_attn_scalar 64"),
        ({"model_type": "gemma2", "sliding_window": 8, "layer_types": ["full_attention"] * 2}, "fixed pattern"),
        ({"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4}, r"heads of 32.*64 / 4"),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "dynamic"}}, "'dynamic'"),
    ],
)
def test_models_that_llama_cpp_would_run_otherwise(config, message):
    with pytest.raises(FormatError, match=message):
        gguf_model.architecture_of({"num_hidden_layers": 2, "head_dim": 32, **config})


def test_a_tensor_without_a_place():
    config = {"model_type": "llama", "num_hidden_layers": 2}
    with pytest.raises(FormatError, match=r"'model.layers.0.extra.weight' has no place"):
        gguf_model.tensor_names(gguf_model.architecture_of(config), config, ["model.layers.0.extra.weight"])


# ---- tokenizers -----------------------------------------------------------------------------------------------------

SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def bpe(*steps, **model):
    return {"model": {"type": "BPE", **model}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}}


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}}


LEVEL = {"type": "ByteLevel", "use_regex": False}


@pytest.mark.parametrize(
    ("tokenizer", "kind"),
    [
        (bpe({"type": "ByteLevel"}), ("gpt2", "gpt-2")),
        (bpe({"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}), ("gpt2", "smollm")),
        (bpe(split(SPLIT % r"\p{N}{1,3}"), LEVEL), ("gpt2", "llama-bpe")),
        (bpe(split(SPLIT % r"\p{N}"), LEVEL), ("gpt2", "qwen2")),
        (bpe(split(TEKKEN), LEVEL), ("gpt2", "tekken")),
        (bpe(byte_fallback=True), ("llama", "default")),
    ],
)
def test_kinds_of_tokenizers(tokenizer, kind):
    assert gguf_tokens.tokenizer_kind(tokenizer) == kind


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (bpe(split("x+"), LEVEL), r"splits text by Split, ByteLevel .* gpt-2, smollm"),
        ({"model": {"type": "Unigram"}}, "kind 'Unigram'"),
    ],
)
def test_unknown_tokenizers_are_refused(tokenizer, message):
    with pytest.raises(FormatError, match=message):
        gguf_tokens.tokenizer_kind(tokenizer)


def test_a_folder_without_tokenizer_and_one_with_too_many_tokens(tmp_path):
    with pytest.raises(FormatError, match=r"no tokenizer.json"):
        gguf_tokens.read_tokenizer(tmp_path)
    shutil.copy(TOKENIZER / "tokenizer.json", tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "x", "llama")
    with pytest.raises(FormatError, match=r"token of id 1023; the embedding has 1000 rows"):
        gguf_tokens.describe_tokenizer(writer, tmp_path, 1000)


def test_scores_follow_the_merges_and_ids_are_filled_up(tmp_path):
    vocabulary = {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "a": 3, "b": 4, "ab": 5, "aba": 6}
    tokenizer = {
        "added_tokens": [{"id": 0, "content": "<unk>", "special": True}, {"id": 1, "content": "<s>", "special": True}],
        "normalizer": {"type": "Prepend", "prepend": "\u2581"},
        "pre_tokenizer": None,
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "unk_token": "<unk>",
            "vocab": vocabulary,
            "merges": [["a", "b"], "ab a"],
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    gguf_tokens.describe_tokenizer(writer, tmp_path, 8)
    found = {key: value.value for key, value in writer.kv_data[0].items()}
    assert found["tokenizer.ggml.tokens"] == [*vocabulary, "[PAD7]"]
    assert found["tokenizer.ggml.scores"][5:7] == [0.0, -1.0]
    kinds = gguf.TokenType
    assert found["tokenizer.ggml.token_type"] == [
        *(kinds.UNKNOWN, kinds.CONTROL, kinds.BYTE),
        *[kinds.NORMAL] * 4,
        kinds.UNUSED,
    ]
    assert found["tokenizer.ggml.add_space_prefix"] is True
