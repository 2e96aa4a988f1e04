"""Train a small Llama (4.6M parameters) on WikiText-2, to prune and to measure on.

    python benchmarks/train_wikitext_model.py --out FOLDER
    python benchmarks/train_wikitext_model.py --out FOLDER --train FILE [--held-out FILE] [--test FILE]

Without `--train` the text is the splits of WikiText-2 (raw) on the hub. Files are in WikiText's own form, lines with an
article's title between single equals signs. The same seed, thread count, text and library versions give the same model.
`training.json` beside it says what it was trained on, and its perplexities.
"""

import argparse
import json
import sys
from pathlib import Path

from environment import describe_machine

from regrow.data.source import articles, load_documents

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
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

SHAPE = Shape(vocab=4096, hidden=256, intermediate=512, layers=6, heads=8, kv_heads=4)
HELD_OUT = 0.1
"""Share of a training file's articles, the last ones, that are held out if no other text is given for that."""
PROMPT = " = The Battle of"


def read_articles(path: Path) -> list[str]:
    """The articles of a file in WikiText's form."""
    with path.open(encoding="utf-8") as lines:
        return [article for article in articles(lines) if article.strip()]


def read_texts(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Articles to train on, held out (they choose the best moment) and, if there are any, to test on."""
    if arguments.train is None:
        splits = {"train": "train", "held out": "validation", "test": "test"}
        return {name: load_documents("wikitext", split=split) for name, split in splits.items()}
    texts = {"train": read_articles(arguments.train)}
    if arguments.held_out is None:
        count = max(1, round(HELD_OUT * len(texts["train"])))
        texts = {"train": texts["train"][:-count], "held out": texts["train"][-count:]}
    else:
        texts["held out"] = read_articles(arguments.held_out)
    if arguments.test is not None:
        texts["test"] = read_articles(arguments.test)
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--train", type=Path, help="a file to train on; without it, the hub's WikiText-2")
    parser.add_argument("--held-out", type=Path, help="a file to choose the best moment by; default: the train's tail")
    parser.add_argument("--test", type=Path, help="a file to measure the result on")
    parser.add_argument("--steps", type=int, default=3000, help=f"of {BATCH} x {WINDOW} tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (the result depends on them)")
    arguments = parser.parse_args()
    if arguments.train is None and (arguments.held_out or arguments.test):
        parser.error("--held-out and --test are files beside --train; give that too")

    prepare(arguments.seed, arguments.threads)
    texts = read_texts(arguments)
    tokenizer = train_tokenizer(texts["train"], SHAPE.vocab)
    save_tokenizer(tokenizer, arguments.out)
    tokens = {name: pack(documents, tokenizer) for name, documents in texts.items()}
    for name, documents in texts.items():
        tell_data(name, documents, tokens[name])
    model = build_model(SHAPE)
    print(f"model: {model.num_parameters():,} parameters", flush=True)
    fit(model, tokens["train"], tokens["held out"], arguments.steps, arguments.out)
    measured = {name: row for name, row in tokens.items() if name != "train"}
    found = {
        "parameters": model.num_parameters(),
        "train": str(arguments.train or "Salesforce/wikitext, wikitext-2-raw-v1"),
        "tokens": {name: len(row) for name, row in tokens.items()},
        "steps": arguments.steps,
        "tokens in a step": BATCH * WINDOW,
        "window": WINDOW,
        "perplexity": try_out(arguments.out, measured, PROMPT),
        "machine": describe_machine(),
    }
    (arguments.out / "training.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
