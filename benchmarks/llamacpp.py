"""Perplexity of a checkpoint in transformers beside that of its GGUF files in llama.cpp, on the same tokens.

    python benchmarks/llamacpp.py CHECKPOINT --data valid.jsonl --types f32 q8_0 q4_0

Both engines get the same windows of token ids, so tokenizers play no part in the figures. llama.cpp computes with one
thread, on the CPU; its KV cache is float32 here, float16 by default. Needs the extra `gguf-check`, which is compiled.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
import torch
from environment import describe_machine
from torch.nn.functional import cross_entropy

from regrow.checkpoint.load import load_model, load_tokenizer
from regrow.data.source import load_documents
from regrow.data.tokens import Windows, make_windows
from regrow.evaluation.perplexity import perplexity
from regrow.formats.llamacpp import K_TYPES, TYPES, write_gguf
from regrow.formats.llamacpp_quantise import write_quantised
from regrow.formats.source import Checkpoint


def main() -> None:
    """Measure, print the table, write the file."""
    options = arguments()
    torch.set_num_threads(1)
    source = Checkpoint(options.checkpoint)
    windows = make_windows(
        load_documents(options.data, "text"),
        load_tokenizer(str(source.folder)),
        options.window,
        bos="document",
        source=options.data,
    ).first(options.max_windows)
    model = load_model(str(source.folder), trust_remote_code=options.trust_remote_code)
    size = sum(file.stat().st_size for file in source.folder.glob("*.safetensors"))
    rows = [row("transformers", "safetensors", size, perplexity(model, windows.ids_NT).nll)]
    for kind in options.types:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch, "model.gguf")
            write = write_quantised if kind in K_TYPES else write_gguf
            written = write(source, file, kind)
            nll = llama_cpp_nll(file, windows)
            rows.append(row("llama.cpp", f"{written.architecture} {kind}", file.stat().st_size, nll))
    if options.out is not None:
        record = {"options": {key: str(value) for key, value in vars(options).items()}, "rows": rows}
        options.out.write_text(json.dumps(record | {"machine": describe_machine()}, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint's folder, or a run's")
    parser.add_argument("--data", required=True, help="text to measure on")
    parser.add_argument("--window", type=int, default=256, help="tokens in a window (default 256)")
    parser.add_argument("--max-windows", type=int, default=100, help="windows to measure on (default 100)")
    types = [*TYPES, *K_TYPES]
    parser.add_argument("--types", nargs="+", default=["f32", "q8_0"], choices=types, help="of the GGUF files")
    parser.add_argument("--trust-remote-code", action="store_true", help="for uneven layers in transformers")
    parser.add_argument("--out", type=Path, help="JSON file for the results, machine and versions")
    return parser.parse_args()


def row(engine: str, file: str, size: int, nll: float) -> dict[str, object]:
    """A line of the table, printed as soon as it is known."""
    print(f"| {engine} | {file} | {size / 1e6:.2f} MB | {math.exp(nll):.4f} |", flush=True)
    return {"engine": engine, "file": file, "bytes": size, "nll": nll, "perplexity": math.exp(nll)}


def llama_cpp_nll(file: Path, windows: Windows) -> float:
    """Mean negative log-likelihood, in nats, of all tokens but the first of each window."""
    exact = llama_cpp.GGML_TYPE_F32
    engine = llama_cpp.Llama(
        str(file), n_ctx=windows.length, n_batch=windows.length, n_threads=1, n_threads_batch=1, logits_all=True,
        verbose=False, type_k=exact, type_v=exact, flash_attn=False,
    )  # fmt: skip
    losses = []
    for ids in windows.ids_NT:
        engine.reset()
        engine.eval(ids.tolist())
        logits = torch.from_numpy(np.array(engine.scores[: len(ids) - 1]))
        losses.append(float(cross_entropy(logits, ids[1:])))
    return sum(losses) / len(losses)


if __name__ == "__main__":
    main()
