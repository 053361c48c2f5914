import pytest
from transformers import LlamaConfig

from mezzotint.calibration import begin_token, check_vocabulary, load_tokenizer, separator_token
from mezzotint.errors import CalibrationError, ModelError


@pytest.mark.parametrize(
    ("fixture", "begin", "separator"),
    [
        ("chat_tokenizer", None, "<|endoftext|>"),
        ("llama_tokenizer", "<s>", "<s>"),
        ("plain_tokenizer", None, "</s>"),
        ("bare_tokenizer", None, None),
    ],
)
def test_tokens_that_open_and_separate(fixture, begin, separator, request):
    tokenizer = request.getfixturevalue(fixture)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in (begin, separator) if name}
    assert begin_token(tokenizer) == ids.get(begin)
    assert separator_token(tokenizer) == ids.get(separator)


def test_tokenizer_survives_a_folder(llama_tokenizer, tmp_path):
    llama_tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded("ab").input_ids == llama_tokenizer("ab").input_ids
    assert begin_token(loaded) == begin_token(llama_tokenizer)


def test_folders_without_tokenizer(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"Tokenizer files: none\. Copy"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ModelError, match=r"no usable tokenizer.*tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_ids_must_fit_the_model(llama_tokenizer):
    largest = len(llama_tokenizer) - 1
    check_vocabulary(llama_tokenizer, LlamaConfig(vocab_size=largest + 1))
    with pytest.raises(CalibrationError, match=rf"has id {largest}, and the model embeds {largest} tokens"):
        check_vocabulary(llama_tokenizer, LlamaConfig(vocab_size=largest))


def test_marks_that_text_never_becomes_do_not_count(plain_tokenizer, tmp_path):
    plain_tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    size = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    check_vocabulary(tokenizer, LlamaConfig(vocab_size=size))
    tokenizer.add_special_tokens({"bos_token": "<begin>"})  # not added to texts, so it does not count either
    check_vocabulary(tokenizer, LlamaConfig(vocab_size=size))
    tokenizer.add_special_tokens({"eos_token": "<end>"})  # separates documents
    with pytest.raises(CalibrationError, match="'<end>'"):
        check_vocabulary(tokenizer, LlamaConfig(vocab_size=size))
