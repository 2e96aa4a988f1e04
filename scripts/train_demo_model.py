"""Train the demo model: a small Llama that has read the Python standard library's documentation.

    python scripts/train_demo_model.py --out src/regrow/demo/model

Everything comes from the running interpreter (see `regrow.demo.corpus`), so nothing is downloaded,
and one CPU thread is enough. The same seed, thread count and library versions give the same model.
"""

import argparse
from pathlib import Path

from small_llama import (
    BATCH,
    WINDOW,
    Shape,
    build_model,
    fit,
    pack,
    prepare,
    save_tokenizer,
    tell_data,
    train_tokenizer,
    try_out,
)

from regrow.demo.corpus import standard_library_corpus

SHAPE = Shape(vocab=2048, hidden=192, intermediate=512, layers=6, heads=8, kv_heads=4)
"""2.8 million parameters."""
PROMPT = "Return a list of"


def main() -> None:
    """Read the options, train, and measure what was saved."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--steps", type=int, default=1400, help=f"of {BATCH} x {WINDOW} tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (the result depends on them)")
    args = parser.parse_args()

    prepare(args.seed, args.threads)
    corpus = standard_library_corpus()
    tokenizer = train_tokenizer(corpus.train, SHAPE.vocab)
    save_tokenizer(tokenizer, args.out)
    train, held_out = pack(corpus.train, tokenizer), pack(corpus.held_out, tokenizer)
    model = build_model(SHAPE)
    tell_data("train", corpus.train, train)
    tell_data("held out", corpus.held_out, held_out)
    print(f"model: {model.num_parameters():,} parameters")
    fit(model, train, held_out, args.steps, args.out)
    try_out(args.out, {"held-out": held_out}, PROMPT)


if __name__ == "__main__":
    main()
