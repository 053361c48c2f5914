import json
import sys
import types

import pytest

from mezzotint.calibration import read_documents, read_text
from mezzotint.errors import CalibrationError

ARTICLES = '<doc id="1" title="A">\nFirst.\n\nMore of it.\n</doc>\n\n<doc id="2">\nSecond.\n</doc>\n'


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_lines(folder, *records):
    return write(folder, "data.jsonl", "\n".join(json.dumps(record) for record in records) + "\n\n")


def refused(match, *arguments, **settings):
    with pytest.raises(CalibrationError, match=match):
        read_documents(*arguments, **settings)


def test_text_files(tmp_path):
    plain = write(tmp_path, "plain.txt", "One.\r\n\r\nTwo <doc> here.\n \nThree.\n")
    assert read_documents(plain) == ["One.\n\nTwo <doc> here.\n \nThree.\n"]
    assert read_text(plain) == "One.\n\nTwo <doc> here.\n \nThree.\n"
    assert read_documents(str(plain), lines=True) == ["One.", "Two <doc> here.", "Three."]
    articles = write(tmp_path, "articles.raw", ARTICLES)
    assert [document.strip() for document in read_documents(articles)] == ["First.\n\nMore of it.", "Second."]
    assert read_text(articles).split() == ["First.", "More", "of", "it.", "Second."]
    before = write(tmp_path, "before.md", "\ufeffPreface.\n<doc>\nText, and <doc > inside a line.\n")
    assert read_documents(before) == ["Preface.\n", "Text, and <doc > inside a line.\n"]
    assert read_documents(write(tmp_path, "words.txt", "<document>\nx\n")) == ["<document>\nx\n"]


def test_records(tmp_path, chat_tokenizer):
    path = write_lines(tmp_path, {"content": "c", "text": "t", "id": 1}, {"text": "u", "id": 2}, {"text": " "})
    assert read_documents(path) == ["t", "u"]
    assert read_text(path) == "t\n\nu"
    refused(r"line 2 has no field 'content'\. Name one of its fields: id, text", path, field="content")
    refused(r"no field 'body'\. Name one of its fields: content, id, text", path, field="body")
    refused("field 'id' of .* is a int", path, field="id")
    other = write_lines(tmp_path, {"body": "x"})
    refused(r"none of the fields text, content \('messages' needs a tokenizer.*fields: body", other)
    refused(r"none of the fields messages, text, content\. Name", other, chat_tokenizer)
    assert read_documents(other, field="body") == ["x"]


def test_chats(tmp_path, chat_tokenizer, llama_tokenizer):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = write_lines(tmp_path, {"messages": chat, "text": "t"})
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n"
    assert read_documents(path, chat_tokenizer) == [rendered]
    assert read_documents(path, llama_tokenizer) == ["t"]
    assert read_documents(path) == ["t"]
    refused("a chat needs a tokenizer with a chat template", path, llama_tokenizer, field="messages")
    refused("is a list, and a text or a list of messages", write_lines(tmp_path, {"messages": []}), chat_tokenizer)
    broken = write_lines(tmp_path, {"messages": chat})
    template, chat_tokenizer.chat_template = chat_tokenizer.chat_template, "{{ raise_exception('roles alternate') }}"
    try:
        refused("template rejects this chat: roles alternate", broken, chat_tokenizer)
    finally:
        chat_tokenizer.chat_template = template


def test_lines_that_are_no_records(tmp_path):
    refused(r"line 2 is not JSON: .* at column 1", write(tmp_path, "a.jsonl", '{"text": "x"}\nnot\n'))
    refused(r"line 1 is a list\. A \.jsonl file holds one object per line", write(tmp_path, "a.jsonl", "[1]\n"))


def test_files_that_cannot_be_read(tmp_path):
    write(tmp_path, "corpus.txt", "x")
    refused(r"does not exist\. Did you mean '.*corpus\.txt'", tmp_path / "corpsu.txt")
    refused(r"does not exist\. Check the path", tmp_path / "no" / "folder.txt")
    refused(r"is a directory\. Give one of its files \(corpus\.txt\)", tmp_path)
    for name, content in (("empty.txt", ""), ("blank.txt", " \n\n"), ("empty.jsonl", "\n")):
        refused(r"has no text \(.* all empty\)", write(tmp_path, name, content))
    refused(r"not UTF-8: byte 0xff at offset 5 of 7.*iconv", write(tmp_path, "latin.txt", b"abcd\n\xff\n"))
    refused(r"unknown kind of calibration text '\.json'.*Did you mean '\.jsonl'", write(tmp_path, "a.json", "{}"))
    refused(r"unknown calibration text 'wikitext'. Did you mean 'wikitext2'\? Known: c4, ptb, wikitext2", "wikitext")
    with pytest.raises(CalibrationError, match="has no text"):
        read_text(tmp_path / "empty.txt")


def test_parquet_without_its_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(r"'pyarrow', which is not installed.*mezzotint\[data\]", write(tmp_path, "a.parquet", "x"))


def test_parquet(tmp_path, chat_tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    chat = [{"role": "user", "content": "hi"}]
    parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["a", "b"], "messages": [chat, chat]}), path)
    assert read_documents(path) == ["a", "b"]
    assert read_documents(path, chat_tokenizer) == ["<|im_start|>user\nhi<|im_end|>\n"] * 2
    refused("no field 'x'. Name one of its fields: id, messages, text", path, field="x")
    refused("row 0: field 'id' of .* is a int", path, field="id")
    refused("not a readable Parquet file", write(tmp_path, "b.parquet", "no such thing"))


def fake_datasets(monkeypatch, load_dataset):
    """The library, where it is not installed."""
    module = types.ModuleType("datasets")
    module.exceptions = types.SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_data_sets(monkeypatch):
    asked = []

    def load_dataset(path, **settings):
        asked.append((path, settings["split"]))
        return {"text": ["a", "b", "c"], "sentence": ["x", "y"]}

    fake_datasets(monkeypatch, load_dataset)
    assert read_documents("wikitext2") == ["a\n\nb\n\nc"]
    assert read_text("wikitext2") == "a\n\nb\n\nc"
    assert read_documents("c4") == ["a", "b", "c"]
    assert read_text("c4", split="validation") == "a b c"
    assert read_text("ptb", split="validation") == "x y"
    assert [split for _, split in asked] == ["train", "test", "train", "validation", "validation"]
    refused("unknown split of wikitext2 'tests'. Did you mean 'test'", "wikitext2", split="tests")
    with pytest.raises(CalibrationError, match=r"unknown split of c4 'test'.*Known: train, validation"):
        read_text("c4")


def test_data_sets_out_of_reach(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(r"'datasets', which is not installed.*mezzotint\[data\]", "wikitext2")

    def load_dataset(path, **settings):
        raise ConnectionError("Couldn't reach the Hub")

    fake_datasets(monkeypatch, load_dataset)
    refused(r"c4 \(allenai/c4, train\) could not be read from the hub.*Couldn't reach.*Connect", "c4")
