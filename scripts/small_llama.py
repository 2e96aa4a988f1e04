"""Small Llamas from scratch, on a CPU: tokenizer, model, training loop, and what is saved of them.

The same seed, thread count and library versions give the same model.
"""

import copy
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
POSITIONS = 512
WINDOW, BATCH = 256, 16
"""Tokens in a row, rows in a step."""
EVAL_EVERY = 100
LEARNING_RATE, WARM_UP, WEIGHT_DECAY, DROPOUT = 3e-3, 100, 0.1, 0.1


@dataclass(frozen=True)
class Shape:
    """What of a Llama is chosen here; grouped-query attention gives pruning groups to respect."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int


def prepare(seed: int, threads: int) -> None:
    """From here on chance comes from the seed alone."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)


def train_tokenizer(documents: Sequence[str], vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: 256 bytes, two special tokens, and merges learned from the documents."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS, EOS],  # ids 0 and 1
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    reads = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, model_max_length=POSITIONS, model_input_names=reads
    )


def pack(documents: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """All documents in one row of tokens, each after its `<s>` (which the tokenizer adds)."""
    rows = tokenizer(list(documents), verbose=False)["input_ids"]
    return torch.tensor([token for row in rows for token in row])


def build_model(shape: Shape) -> LlamaForCausalLM:
    """Random weights."""
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def add_dropout(model: LlamaForCausalLM, rate: float) -> None:
    """Llama has no dropout on its residual branches; a small corpus read many times wants some."""
    for layer in model.model.layers:
        for branch in (layer.self_attn.o_proj, layer.mlp.down_proj):
            branch.register_forward_hook(
                lambda module, _, out: nn.functional.dropout(out, rate, training=module.training)
            )


def build_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW that decays the matrices and leaves the norms alone."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""
    if step < WARM_UP:
        return LEARNING_RATE * (step + 1) / WARM_UP
    progress = (step - WARM_UP) / max(1, steps - WARM_UP)
    return LEARNING_RATE * (0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)


def sample(tokens: Tensor) -> Tensor:
    """A batch of windows at random offsets; each has one token more than the model reads."""
    starts = torch.randint(len(tokens) - WINDOW, (BATCH, 1))
    return tokens[starts + torch.arange(WINDOW + 1)]


def loss_of(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Mean cross-entropy of every next token in windows of WINDOW + 1 tokens."""
    logits = model(windows[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, tokens: Tensor) -> float:
    """Perplexity over the whole row of tokens, in windows that start afresh every WINDOW tokens."""
    model.eval()
    windows = tokens[: (len(tokens) - 1) // WINDOW * WINDOW + 1].unfold(0, WINDOW + 1, WINDOW)
    total = sum(loss_of(model, part).item() * len(part) for part in windows.split(BATCH))
    model.train()
    return math.exp(total / len(windows))


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save it under the class name that every release of transformers knows."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def save_model(model: LlamaForCausalLM, out: Path) -> None:
    """Save a bfloat16 copy; the model itself goes on training in float32."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)


def fit(model: LlamaForCausalLM, train: Tensor, held_out: Tensor, steps: int, out: Path) -> None:
    """Train for some steps of BATCH x WINDOW tokens; `out` gets the model that predicts `held_out` best."""
    add_dropout(model, DROPOUT)
    optimizer = build_optimizer(model)
    best, recent, started = math.inf, 0.0, time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = loss_of(model, sample(train))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent = loss.item() if step == 0 else 0.95 * recent + 0.05 * loss.item()

        if (step + 1) % EVAL_EVERY == 0 or step + 1 == steps:
            now = perplexity(model, held_out)
            kept = now < best
            if kept:
                best = now
                save_model(model, out)
            minutes = (time.monotonic() - started) / 60
            print(
                f"step {step + 1:5d}  {minutes:5.1f} min  train {math.exp(recent):7.2f}"
                f"  held-out {now:7.2f}{'  saved' if kept else ''}",
                flush=True,
            )


def tell_data(name: str, documents: Sequence[str], tokens: Tensor) -> None:
    """One line on a text."""
    print(f"{name}: {len(documents)} documents, {len(tokens)} tokens")


def try_out(out: Path, texts: dict[str, Tensor], prompt: str) -> dict[str, float]:
    """Load what was saved, measure it and let it write; the perplexity of each text, by name."""
    saved, reader = LlamaForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    found = {name: perplexity(saved, tokens) for name, tokens in texts.items()}
    for name, value in found.items():
        print(f"saved model in {saved.dtype}: {name} perplexity {value:.3f}")
    answer = saved.eval().generate(**reader(prompt, return_tensors="pt"), max_new_tokens=64, do_sample=False)
    print(reader.decode(answer[0], skip_special_tokens=True))
    return found
