"""Runs inside the environment of llama-cpp-python, which has none of ours: logits of given tokens.

Arguments: a GGUF file, JSON of lists of token numbers, a text, a file for the logits. Prints one JSON line: the tokens
of the text, and what the model writes behind it.
"""

import json
import sys

import numpy as np

if __name__ == "__main__":
    from llama_cpp import Llama, llama_cpp

    path, prompts, text, target = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], sys.argv[4]
    defaults = llama_cpp.llama_model_default_params

    def plain_buffers():
        settings = defaults()
        settings.use_extra_bufts = False  # those for AMX crash in 0.3.36
        return settings

    llama_cpp.llama_model_default_params = plain_buffers
    model = Llama(model_path=path, n_ctx=128, logits_all=True, verbose=False, n_threads=1)
    logits = []
    for tokens in prompts:
        model.reset()
        model.eval(tokens)
        logits.append(model.scores[: len(tokens)].copy())
    np.save(target, np.stack(logits))
    model.reset()
    written = model(text, max_tokens=8, temperature=0.0)["choices"][0]["text"]
    found = {"tokens": model.tokenize(text.encode(), add_bos=True, special=False), "written": written}
    sys.stdout.write("\nRESULT " + json.dumps(found) + "\n")
