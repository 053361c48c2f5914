"""Runs inside the environment of vLLM, which has none of ours: log-probabilities of given tokens.

Arguments: the model folder, the dtype, and JSON of lists of token numbers. Prints one JSON line: for each list, the
log-probability of every token after the first.
"""

import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    folder, dtype, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    llm = LLM(model=folder, dtype=dtype, enforce_eager=True, max_model_len=64, skip_tokenizer_init=True, max_num_seqs=2)
    settings = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": tokens} for tokens in prompts], settings)
    found = [
        [entry[token].logprob for token, entry in zip(tokens[1:], output.prompt_logprobs[1:], strict=True)]
        for tokens, output in zip(prompts, outputs, strict=True)
    ]
    sys.stdout.write("\nRESULT " + json.dumps(found) + "\n")
