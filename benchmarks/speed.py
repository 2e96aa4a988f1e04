"""What halving the blocks of a LLaMA buys: measured speed-ups next to the ideal ones.

    python benchmarks/speed.py --threads 1 --out results.json

Two models with random weights, of about 100 and 50 million block parameters: the second has half the KV
heads (with their query heads) and half the FFN channels in every layer, which is what a uniform plan at 50 %
leaves. The vocabulary is small, so that the blocks are nearly all there is. Reading a prompt is bound by
arithmetic, so its ideal speed-up is the ratio of multiply-accumulates; writing token by token is bound by
memory traffic, so its ideal is the ratio of bytes (for small batches and short texts, where the weights are
nearly all that is read; on a CPU a batch of a few is already bound by arithmetic in part).
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from environment import describe_machine
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from regrow.evaluation.machine import processor
from regrow.evaluation.size import Size, measure_size
from regrow.evaluation.speed import Rate, Speed, measure_speed, ratios


def main() -> None:
    """Build, measure, print the table, write the file."""
    options = arguments()
    torch.set_num_threads(options.threads)
    shapes = {"dense": llama(kv_heads=4, width=3072), "pruned": llama(kv_heads=2, width=1536)}
    models = {name: build(shape, options.device, options.dtype) for name, shape in shapes.items()}
    sizes = {name: measure_size(model, options.prompt) for name, model in models.items()}
    print(counts(sizes), flush=True)
    speeds = measure_speed(
        models, options.batches, options.prompt, options.new_tokens, options.repeats, options.warm_up
    )
    print(table(sizes, speeds))
    if options.out is not None:
        options.out.write_text(json.dumps(record(options, sizes, speeds), indent=1) + "\n")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of torch's CPU pool (default 1)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, … (default cpu)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="batch sizes (default 1 4)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens per prompt (default 128)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to write (default 32)")
    parser.add_argument("--repeats", type=int, default=7, help="timed turns of each model (default 7)")
    parser.add_argument("--warm-up", type=int, default=2, help="turns before them (default 2)")
    parser.add_argument("--out", type=Path, help="JSON file for the results, machine and versions")
    return parser.parse_args()


def llama(kv_heads: int, width: int) -> LlamaConfig:
    """Twelve layers of hidden size 768 with three query heads of 64 to each KV head."""
    return LlamaConfig(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=3 * kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        intermediate_size=width,
        vocab_size=1024,
        max_position_embeddings=2048,
    )


def build(config: LlamaConfig, device: str, dtype: str) -> PreTrainedModel:
    """A model with random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model


def counts(sizes: Mapping[str, Size]) -> str:
    """The exact counts, one model per row."""
    rows = [
        f"| {name} | {size.total:,} | {size.non_embedding:,} | {size.bytes:,} | {size.macs_per_token:,} |"
        for name, size in sizes.items()
    ]
    length = sizes["dense"].length
    head = ["", "parameters", "outside the embeddings", "bytes", f"MACs per token of {length}"]
    return "\n".join([_row(head), _row(["---"] + ["---:"] * 4), *rows, ""])


def table(sizes: Mapping[str, Size], speeds: Mapping[str, tuple[Speed, ...]]) -> str:
    """Medians (with quartiles), speed-ups and ideals, one row for each phase and batch size."""
    lines = [
        _row(["phase", "batch", "dense tokens/s", "pruned tokens/s", "speed-up", "ideal"]),
        _row(["---"] + ["---:"] * 5),
    ]
    ideal_prefill, ideal_decode = ideals(sizes)
    trios = list(zip(speeds["dense"], speeds["pruned"], ratios(speeds["dense"], speeds["pruned"]), strict=True))
    for dense, pruned, up in trios:
        cells = ["prefill", str(up.batch), _rate(dense.prefill), _rate(pruned.prefill)]
        lines.append(_row([*cells, f"{up.prefill:.2f}x", f"{ideal_prefill:.2f}x"]))
    for dense, pruned, up in trios:
        cells = ["decode", str(up.batch), _rate(dense.decode), _rate(pruned.decode)]
        lines.append(_row([*cells, f"{up.decode:.2f}x", f"{ideal_decode:.2f}x"]))
    return "\n".join(lines)


def ideals(sizes: Mapping[str, Size]) -> tuple[float, float]:
    """The speed-ups that arithmetic (prefill) and memory traffic (decode) allow."""
    dense, pruned = sizes["dense"], sizes["pruned"]
    return dense.macs_per_token / pruned.macs_per_token, dense.bytes / pruned.bytes


def record(
    options: argparse.Namespace, sizes: Mapping[str, Size], speeds: Mapping[str, tuple[Speed, ...]]
) -> dict[str, object]:
    """Everything that someone needs to judge the numbers or to repeat them."""
    ideal_prefill, ideal_decode = ideals(sizes)
    return {
        "machine": describe_machine(),
        "device": device_name(options.device),
        "settings": {name: value for name, value in vars(options).items() if name != "out"},
        "sizes": {name: asdict(size) for name, size in sizes.items()},
        "speeds": {name: [asdict(speed) for speed in found] for name, found in speeds.items()},
        "speedups": [asdict(up) for up in ratios(speeds["dense"], speeds["pruned"])],
        "ideals": {"prefill": ideal_prefill, "decode": ideal_decode},
    }


def device_name(device: str) -> str:
    """The processor's own name, as far as the system tells it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return processor()


def _rate(rate: Rate) -> str:
    return f"{rate.median:.1f} ({rate.low:.1f} to {rate.high:.1f})"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
