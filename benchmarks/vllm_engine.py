"""What vLLM makes of token ids; run by a Python that has vLLM, and need not have regrow.

    python vllm_engine.py JOBS.json

JOBS.json is a list of `{"model", "ids": [[…], …], "new_tokens", "remote_code", "implementation"}`; for each one line of
JSON is printed: `log_probs` of all tokens of every prompt but its first, `tokens` written greedily, the `class` that
computed; or `error`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, SamplingParams


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """The line for one job."""
    engine = LLM(
        job["model"], skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_num_seqs=4,
        max_model_len=max(map(len, job["ids"])) + job["new_tokens"], trust_remote_code=job["remote_code"],
        model_impl=job["implementation"], enable_prefix_caching=False,
    )  # fmt: skip
    wanted = SamplingParams(
        temperature=0, max_tokens=job["new_tokens"], prompt_logprobs=0, ignore_eos=True, detokenize=False
    )
    done = engine.generate([{"prompt_token_ids": ids} for ids in job["ids"]], wanted, use_tqdm=False)
    return {
        "log_probs": [
            [told[token].logprob for token, told in zip(ids[1:], one.prompt_logprobs[1:], strict=True)]
            for ids, one in zip(job["ids"], done, strict=True)
        ],
        "tokens": [list(one.outputs[0].token_ids) for one in done],
        "class": engine.apply_model(lambda model: type(model).__name__)[0],
    }


if __name__ == "__main__":
    for each in json.loads(Path(sys.argv[1]).read_text()):
        try:
            print(json.dumps(answer(each)), flush=True)
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"[:500]}), flush=True)
