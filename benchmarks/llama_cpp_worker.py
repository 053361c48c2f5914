"""Runs inside an environment of llama-cpp-python, which has none of ours: quantizes and compares GGUF files.

    quantize DENSE IMPORTANCE.npz TARGET FTYPE     llama.cpp's own quantizer with an importance matrix
    matrix WEIGHT.npy IMPORTANCE.npy TARGET.npy TYPE BYTES    the same of one matrix, as rows of blocks
    compare DENSE WINDOWS.npy FILE...              perplexity of each file, and its divergence from the dense one

The last prints one line ``RESULT {json}``. A processor with AMX crashes in the default buffers of 0.3.36, so they
are left out.
"""

import ctypes
import json
import os
import sys
from pathlib import Path

import numpy as np
from llama_cpp import llama_cpp as lib

THREADS = int(os.environ.get("MEZZOTINT_THREADS", "1"))


def quantize(dense, importance, target, ftype):
    """Run llama.cpp's quantizer; the file has the mean square of every input of every matrix."""
    loaded = np.load(importance)
    arrays = {name: np.ascontiguousarray(loaded[name], dtype=np.float32) for name in loaded.files}
    entries = (lib.llama_model_imatrix_data * (len(arrays) + 1))()
    for entry, (name, values) in zip(entries, arrays.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(type(entry.data))
        entry.size = values.size
    settings = lib.llama_model_quantize_default_params()
    settings.ftype, settings.nthread, settings.imatrix = int(ftype), THREADS, entries
    failed = lib.llama_model_quantize(dense.encode(), target.encode(), ctypes.byref(settings))
    if failed:
        raise SystemExit(f"llama_model_quantize gave {failed}")


def matrix(weight, importance, target, kind, row_bytes):
    """Blocks of one matrix by ggml's quantizer."""
    from llama_cpp import _ggml

    values = np.ascontiguousarray(np.load(weight), dtype=np.float32)
    weights = np.ascontiguousarray(np.load(importance), dtype=np.float32)
    blocks = np.zeros((len(values), int(row_bytes)), dtype=np.uint8)
    chunk = _ggml.libggml.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    size = chunk(int(kind), values.ctypes.data, blocks.ctypes.data, 0, *values.shape, weights.ctypes.data)
    if size != blocks.nbytes:
        raise SystemExit(f"ggml_quantize_chunk wrote {size} of {blocks.nbytes} bytes")
    np.save(target, blocks)


class Model:
    """A file with a context that holds one window."""

    def __init__(self, path, length):
        settings = lib.llama_model_default_params()
        settings.use_extra_bufts = False
        self.model = lib.llama_model_load_from_file(path.encode(), settings)
        if not self.model:
            raise SystemExit(f"{path} does not load")
        options = lib.llama_context_default_params()
        options.n_ctx = options.n_batch = length
        options.n_ubatch = min(512, length)
        options.n_threads = options.n_threads_batch = THREADS
        self.context = lib.llama_init_from_model(self.model, options)
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def log_probabilities(self, tokens):
        """Of every next token, ``[tokens, vocabulary]``."""
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, True
        if lib.llama_decode(self.context, batch):
            raise SystemExit("llama_decode failed")
        raw = lib.llama_get_logits(self.context)
        logits = np.ctypeslib.as_array(raw, shape=(len(tokens), self.vocabulary)).copy()
        lib.llama_batch_free(batch)
        logits -= logits.max(1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(1, keepdims=True))
        return logits


def compare(dense, windows, files):
    """Divergence from the dense file, and perplexity, of every file; all run window by window side by side."""
    tokens = np.load(windows)
    models = {path: Model(path, tokens.shape[1]) for path in (dense, *files)}
    loss = dict.fromkeys(models, 0.0)
    divergence = {path: [] for path in models}
    for number, row in enumerate(tokens):
        reference = models[dense].log_probabilities(row)
        weights = np.exp(reference)
        for path, model in models.items():
            found = reference if path == dense else model.log_probabilities(row)
            loss[path] -= float(found[np.arange(len(row) - 1), row[1:]].astype(np.float64).sum())
            divergence[path].append(float((weights * (reference - found)).sum(1)[:-1].mean()))
        sys.stderr.write(f"window {number + 1} of {len(tokens)}\n")
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    result = {
        path: {
            "perplexity": float(np.exp(loss[path] / count)),
            "kl_nats": float(np.mean(divergence[path])),
            "kl_stderr": float(np.std(divergence[path], ddof=1) / len(tokens) ** 0.5),
            "file_bytes": Path(path).stat().st_size,
        }
        for path in models
    }
    sys.stdout.write("RESULT " + json.dumps(result) + "\n")


if __name__ == "__main__":
    silent = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(silent, None)
    lib.llama_backend_init()
    if sys.argv[1] == "quantize":
        quantize(*sys.argv[2:6])
    elif sys.argv[1] == "matrix":
        matrix(*sys.argv[2:7])
    else:
        compare(sys.argv[2], sys.argv[3], sys.argv[4:])
