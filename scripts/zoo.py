"""Which families of models regrow can prune: tiny random ones, pruned and held to what a pruned model must keep.

    python scripts/zoo.py [--write] [FAMILY …]

prints the table of docs/models.md, or writes it there. The tests run the same checks over the same families.

Every family has its LoRA filled, loses heads, channels, experts and a layer, as far as its stock class allows. Then:
masked ≡ cut (logits, LoRA live), merged and saved ≡ reloaded by stock transformers in a fresh process, and it
writes with the KV cache what it writes without.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from regrow.checkpoint.offer import ranges
from regrow.checkpoint.save import name_the_class
from regrow.checkpoint.shape import describe
from regrow.checkpoint.stock import Widths, check_fewer_layers, check_free, stock_widths
from regrow.errors import InputError
from regrow.structure.adapters import adapter_parameters, attach_lora, merge_lora
from regrow.structure.cut import cut
from regrow.structure.finding import find_groups
from regrow.structure.gates import Gates
from regrow.structure.groups import Groups

PROBE = Path(__file__).with_name("zoo_probe.py")
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
MARK = "<!-- zoo -->"
CLOSE = 1e-4

IDS = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(1))
TOKENS = {"vocab_size": 96, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIZES = {**TOKENS, "hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 3, "max_position_embeddings": 64}
MHA = {**SIZES, "num_attention_heads": 8}
GQA = {**MHA, "num_key_value_heads": 4}
GPT2 = {"n_layer": 3, "n_embd": 64, "n_head": 8, "n_positions": 64, "n_inner": 40, "bos_token_id": 0, "eos_token_id": 1}
FALCON = {**TOKENS, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "ffn_hidden_size": 40}
LOCAL = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    **ROUTED, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
"""Attention through latents, and experts in groups."""
FOUR = {**GQA, "num_hidden_layers": 4}
MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
DELTA = {
    "head_dim": 12, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
GEMMA4 = {
    **FOUR, "head_dim": 8, "global_head_dim": 64, "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
SHARING = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96}
CONVOLUTIONS = ["conv", "full_attention"] * 2

FAMILIES: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "Llama": lambda: hf.LlamaConfig(**GQA),
    "Mistral": lambda: hf.MistralConfig(**GQA, head_dim=12, sliding_window=None),
    "Qwen2": lambda: hf.Qwen2Config(**GQA),
    "Qwen3": lambda: hf.Qwen3Config(**GQA, head_dim=12),
    "Gemma": lambda: hf.GemmaConfig(**GQA, head_dim=12),
    "Gemma 2": lambda: hf.Gemma2Config(**GQA, **LOCAL, head_dim=12),
    "Gemma 3 (text)": lambda: hf.Gemma3TextConfig(**GQA, **LOCAL, head_dim=12),
    "Gemma 3": lambda: hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**GQA, **LOCAL, head_dim=12),
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=2,
        boi_token_index=1,
        eoi_token_index=1,
    ),
    "Gemma 4": lambda: hf.Gemma4TextConfig(
        **GEMMA4, attention_k_eq_v=True, num_global_key_value_heads=2, hidden_size_per_layer_input=0
    ),
    "Gemma 4 (MoE)": lambda: hf.Gemma4TextConfig(
        **GEMMA4,
        attention_k_eq_v=True,
        num_global_key_value_heads=2,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=16,
    ),
    "Gemma 4 (E4B)": lambda: hf.Gemma4TextConfig(**GEMMA4, **SHARING),
    "Gemma 4 (E4B, sees)": lambda: hf.Gemma4Config(
        text_config=hf.Gemma4TextConfig(**GEMMA4, **SHARING),
        audio_config=None,
        vision_config={**VISION, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16},
        image_token_id=2,
        audio_token_id=2,
        video_token_id=2,
    ),
    "Llama 4": lambda: hf.Llama4TextConfig(
        **{**FOUR, "intermediate_size": 24},
        intermediate_size_mlp=40,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        attention_chunk_size=128,
    ),
    "Ministral": lambda: hf.MinistralConfig(**GQA, **LOCAL, head_dim=12),
    "Phi": lambda: hf.PhiConfig(**GQA),
    "Phi-3": lambda: hf.Phi3Config(**GQA),
    "GPT-2": lambda: hf.GPT2Config(**GPT2, vocab_size=96),
    "GPT-J": lambda: hf.GPTJConfig(**GPT2, vocab_size=96, rotary_dim=4),
    "OPT": lambda: hf.OPTConfig(**{**MHA, "intermediate_size": None}, ffn_dim=40, word_embed_proj_dim=64),
    "GPT-NeoX": lambda: hf.GPTNeoXConfig(**MHA),
    "OLMo 2": lambda: hf.Olmo2Config(**GQA),
    "OLMo 3": lambda: hf.Olmo3Config(**GQA, **LOCAL),
    "Granite": lambda: hf.GraniteConfig(**GQA),
    "StarCoder2": lambda: hf.Starcoder2Config(**GQA, sliding_window=None),
    "SmolLM3": lambda: hf.SmolLM3Config(**GQA, no_rope_layers=[1, 1, 0]),
    "Cohere": lambda: hf.CohereConfig(**GQA, use_qk_norm=True),
    "Cohere 2": lambda: hf.Cohere2Config(**GQA, **LOCAL),
    "GLM": lambda: hf.GlmConfig(**GQA, head_dim=12),
    "GLM-4": lambda: hf.Glm4Config(**GQA, head_dim=12),
    "Nemotron": lambda: hf.NemotronConfig(**GQA, head_dim=12),
    "StableLM": lambda: hf.StableLmConfig(**GQA),
    "Helium": lambda: hf.HeliumConfig(**GQA, head_dim=8),
    "Arcee": lambda: hf.ArceeConfig(**GQA, head_dim=12),
    "Apertus": lambda: hf.ApertusConfig(**GQA),
    "EXAONE 4": lambda: hf.Exaone4Config(**GQA, **LOCAL, head_dim=12, sliding_window_pattern=None),
    "ERNIE 4.5": lambda: hf.Ernie4_5Config(**GQA, head_dim=12),
    "Seed-OSS": lambda: hf.SeedOssConfig(**GQA, head_dim=12),
    "HunYuan": lambda: hf.HunYuanDenseV1Config(**GQA, head_dim=12),
    "OLMo": lambda: hf.OlmoConfig(**GQA),
    "Ministral 3": lambda: hf.Ministral3Config(**GQA, head_dim=12),
    "VaultGemma": lambda: hf.VaultGemmaConfig(**GQA, **LOCAL, head_dim=12),
    "CWM": lambda: hf.CwmConfig(**GQA, **LOCAL, head_dim=12),
    "Jais 2": lambda: hf.Jais2Config(**GQA, head_dim=12),
    "NanoChat": lambda: hf.NanoChatConfig(**GQA),
    "Doge": lambda: hf.DogeConfig(**GQA),
    "DiffLlama": lambda: hf.DiffLlamaConfig(**GQA),
    "Persimmon": lambda: hf.PersimmonConfig(**MHA),
    "GPT-Neo": lambda: hf.GPTNeoConfig(
        **TOKENS,
        hidden_size=64,
        num_layers=4,
        num_heads=8,
        intermediate_size=40,
        max_position_embeddings=64,
        attention_types=[[["global", "local"], 2]],
        window_size=6,
    ),
    "GPTBigCode": lambda: hf.GPTBigCodeConfig(**GPT2, vocab_size=96),
    "CodeGen": lambda: hf.CodeGenConfig(**GPT2, vocab_size=96, rotary_dim=4),
    "XGLM": lambda: hf.XGLMConfig(
        **TOKENS, d_model=64, ffn_dim=40, num_layers=3, attention_heads=8, max_position_embeddings=64
    ),
    "Falcon (MQA)": lambda: hf.FalconConfig(**FALCON, multi_query=True),
    "Falcon (GQA)": lambda: hf.FalconConfig(**FALCON, num_kv_heads=4, new_decoder_architecture=True),
    "BLOOM": lambda: hf.BloomConfig(**TOKENS, hidden_size=64, n_layer=3, n_head=8),
    "MPT": lambda: hf.MptConfig(d_model=64, n_layers=3, n_heads=8, vocab_size=96, max_seq_len=64),
    "Mixtral": lambda: hf.MixtralConfig(**GQA, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "Qwen2-MoE": lambda: hf.Qwen2MoeConfig(
        **GQA, **EXPERTS, moe_intermediate_size=16, shared_expert_intermediate_size=24
    ),
    "Qwen3-MoE": lambda: hf.Qwen3MoeConfig(**GQA, **EXPERTS, head_dim=12, moe_intermediate_size=16),
    "OLMoE": lambda: hf.OlmoeConfig(**GQA, **EXPERTS),
    "Granite MoE": lambda: hf.GraniteMoeConfig(**GQA, num_local_experts=4, num_experts_per_tok=2),
    "ERNIE 4.5 MoE": lambda: hf.Ernie4_5_MoeConfig(
        **GQA, moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_num_shared_experts=1, moe_layer_start_index=1
    ),
    "GLM-4 MoE": lambda: hf.Glm4MoeConfig(**GQA, **ROUTED, head_dim=12, n_shared_experts=1),
    "dots1": lambda: hf.Dots1Config(**GQA, **ROUTED, head_dim=12, n_shared_experts=1),
    "MiniMax-M2": lambda: hf.MiniMaxM2Config(**GQA, head_dim=12, num_local_experts=4, num_experts_per_tok=2),
    "Phi-3.5-MoE": lambda: hf.PhimoeConfig(**GQA, num_local_experts=4, num_experts_per_tok=2),
    "Granite MoE (shared)": lambda: hf.GraniteMoeSharedConfig(
        **GQA, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=24
    ),
    "EXAONE MoE": lambda: hf.ExaoneMoeConfig(
        **GQA, **EXPERTS, head_dim=12, moe_intermediate_size=16, num_shared_experts=1, sliding_window=6
    ),
    "HunYuan MoE": lambda: hf.HunYuanMoEV1Config(**GQA, head_dim=12, num_experts=4, moe_topk=2),
    "Cohere 2 MoE": lambda: hf.Cohere2MoeConfig(**GQA, **EXPERTS),
    "FlexOlmo": lambda: hf.FlexOlmoConfig(**GQA, **EXPERTS),
    "Solar Open": lambda: hf.SolarOpenConfig(**GQA, **ROUTED, head_dim=12),
    "DeepSeek-V2": lambda: hf.DeepseekV2Config(**MHA, **LATENT, num_key_value_heads=8, first_k_dense_replace=1),
    "DeepSeek-V3": lambda: hf.DeepseekV3Config(**MHA, **LATENT, num_key_value_heads=8, first_k_dense_replace=1),
    "GLM-4 MoE Lite": lambda: hf.Glm4MoeLiteConfig(**MHA, **LATENT, num_key_value_heads=8),
    "MiniCPM3": lambda: hf.MiniCPM3Config(
        **MHA, **{key: size for key, size in LATENT.items() if key.endswith(("_rank", "_dim"))}, num_key_value_heads=8
    ),
    "LFM2": lambda: hf.Lfm2Config(**FOUR, layer_types=CONVOLUTIONS, block_auto_adjust_ff_dim=False),
    "LFM2-MoE": lambda: hf.Lfm2MoeConfig(
        **FOUR, **EXPERTS, layer_types=CONVOLUTIONS, moe_intermediate_size=16, num_dense_layers=1
    ),
    "Qwen3.5": lambda: hf.Qwen3_5TextConfig(**FOUR, **DELTA),
    "Qwen3.5 MoE": lambda: hf.Qwen3_5MoeTextConfig(
        **FOUR, **DELTA, **EXPERTS, moe_intermediate_size=16, shared_expert_intermediate_size=24
    ),
    "Qwen3-Next": lambda: hf.Qwen3NextConfig(
        **FOUR, **DELTA, **EXPERTS, moe_intermediate_size=16, shared_expert_intermediate_size=24
    ),
    "OLMo hybrid": lambda: hf.OlmoHybridConfig(**FOUR, **{k: v for k, v in DELTA.items() if k != "head_dim"}),
    "MiniMax": lambda: hf.MiniMaxConfig(
        **FOUR, num_local_experts=4, num_experts_per_tok=2, layer_types=DELTA["layer_types"], block_size=8
    ),
    "Jamba": lambda: hf.JambaConfig(
        **FOUR,
        **EXPERTS,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        use_mamba_kernels=False,
        mamba_d_state=4,
        mamba_dt_rank=4,
    ),
    "Bamba": lambda: hf.BambaConfig(**FOUR, **MAMBA, mamba_d_head=32, attn_layer_indices=[1, 3]),
    "Granite 4": lambda: hf.GraniteMoeHybridConfig(
        **FOUR,
        **MAMBA,
        mamba_d_head=32,
        layer_types=["mamba", "attention"] * 2,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=24,
    ),
    "Falcon-H1": lambda: hf.FalconH1Config(**GQA, **MAMBA, mamba_d_head=16, mamba_d_ssm=64),
    "Nemotron-H": lambda: hf.NemotronHConfig(
        **{k: v for k, v in FOUR.items() if k != "num_hidden_layers"},
        head_dim=12,
        n_routed_experts=4,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=24,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=1,
        ssm_state_size=8,
        chunk_size=8,
        layers_block_type=["mamba", "attention", "mlp", "moe", "mamba", "attention"],
    ),
    "gpt-oss": lambda: hf.GptOssConfig(
        **GQA, head_dim=12, num_local_experts=4, num_experts_per_tok=2, rope_parameters={"rope_theta": 1e4}
    ),
}


@dataclass(frozen=True)
class Found:
    """What has been seen of a family, before its checkpoint is reloaded."""

    widths: Mapping[str, Widths]
    no_depth: str
    """Why layers cannot be removed; empty if they can."""
    no_free: str
    """Why layers cannot have widths of their own; empty if they can."""
    changed: float
    """Largest difference of logits that masking makes."""
    difference: float
    """Largest difference of logits between masked and cut."""
    linears: int
    """Linears of a layer that carry LoRA."""
    logits: Tensor
    """Of the cut and merged model."""


@dataclass(frozen=True)
class Reloaded:
    """What a fresh process has seen of a checkpoint."""

    model_class: str
    generates: bool
    regrow_imported: bool
    difference: float
    """Largest difference of logits to those of the model that was saved."""


def build(family: str, seed: int = 0) -> hf.PreTrainedModel:
    """A random model of a family, biases and norms away from their trivial values."""
    torch.manual_seed(seed)
    model: hf.PreTrainedModel = hf.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else 0.15
            parameter.copy_(scale * torch.randn_like(parameter) + (parameter if parameter.ndim == 1 else 0))
    return model


def with_lora(model: hf.PreTrainedModel) -> Groups:
    """Attach LoRA wherever a run would, factors away from zero; the groups with them in them."""
    groups = find_groups(model)
    experts = dict.fromkeys(groups.experts, 3)
    attach_lora(model, groups.linears, rank=3, alpha=6, dropout=0.0, experts=experts)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.copy_(0.1 * torch.randn_like(parameter))
    return find_groups(model)


def refused(check: Callable[[], object]) -> str:
    """What a check complains of; nothing if it does not."""
    try:
        check()
    except InputError as error:
        return str(error)
    return ""


def logits_of(model: hf.PreTrainedModel) -> Tensor:
    """Of fixed tokens."""
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def some_units(groups: Groups, widths: Mapping[str, Widths], removed: Sequence[int]) -> dict[str, np.ndarray]:
    """For `cut`: of each kind the largest but one possible number of units, at random; none in layers removed."""
    chance = np.random.default_rng(0)
    keep: dict[str, np.ndarray] = {}
    for group in groups:  # experts come before their channels
        counts = widths[group.kind].counts
        count = counts[-2] if len(counts) > 1 else group.units
        experts = keep.get(f"layers.{group.layer}.expert")
        gone = group.expert is not None and experts is not None and group.expert not in experts
        count = 0 if gone or group.layer in removed else count
        keep[group.name] = np.sort(chance.choice(group.units, count, replace=False))
    return keep


def check(family: str, folder: Path) -> Found:
    """Prune a tiny model of a family as far as its stock class allows, and save it."""
    model = build(family)
    groups = with_lora(model)
    widths = stock_widths(model.config, groups)
    no_depth, no_free = (
        refused(lambda: check_fewer_layers(model.config)),
        refused(lambda: check_free(model.config, groups)),
    )
    removed = [] if no_depth else [1]
    keep = some_units(groups, widths, removed)
    whole = logits_of(model)
    with Gates(model, groups.groups, [groups.layers[number] for number in removed]) as gates:
        for number in removed:
            gates.set(groups.layers[number].unit, torch.zeros(1))
        for group in groups:
            gates.keep(group.name, keep[group.name] if group.layer not in removed else range(group.units))
        masked = logits_of(model)
    left = cut(model, groups, keep)
    difference = float((masked - logits_of(model)).abs().max())
    merge_lora(model)
    describe(model, groups, left)
    model.save_pretrained(folder)
    name_the_class(folder, model.config)
    linears = len(groups.linears) // len(groups.layers)
    changed = float((masked - whole).abs().max())
    return Found(widths, no_depth, no_free, changed, difference, linears, logits_of(model))


def reload(folders: Sequence[Path], expected: Sequence[Tensor]) -> list[Reloaded]:
    """Let one fresh process with stock transformers load all checkpoints."""
    with tempfile.TemporaryDirectory() as scratch:
        ids = Path(scratch, "ids.safetensors")
        save_file({"ids": IDS}, ids)
        command = [sys.executable, "-P", str(PROBE), str(ids), *map(str, folders)]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(child.stderr)
    reports = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    return [
        Reloaded(
            report["class"],
            report["generates"],
            report["regrow_imported"],
            float((load_file(folder / "probe.safetensors")["logits"] - logits).abs().max()),
        )
        for report, folder, logits in zip(reports, folders, expected, strict=True)
    ]


def row(family: str, found: Found, reloaded: Reloaded) -> str:
    """A line of the table."""

    def tick(holds: bool) -> str:
        return "✓" if holds else "✗"

    def width(kind: str) -> str:
        if kind not in found.widths or len(found.widths[kind].counts) == 1:
            return "–"
        one = found.widths[kind]
        if one.counts[0] > 1 and not one.refusal:
            step = one.counts[1] - one.counts[0]
            return f"from {one.counts[0]}" if step == 1 else f"multiples of {step}"
        return "any" if not one.refusal else f"some: {ranges(one.counts)} of {one.counts[-1]}"

    cells = [
        family,
        width("attention"),
        width("ffn"),
        width("expert"),
        "✓" if not found.no_depth else "–",
        "✓" if not found.no_free else "–",
        tick(found.difference < CLOSE < found.changed),
        f"{tick(reloaded.difference < CLOSE and not reloaded.regrow_imported)} {reloaded.model_class}",
        tick(reloaded.generates),
    ]
    return f"| {' | '.join(cells)} |"


HEADER = """\
| family | KV heads | FFN channels | experts | layers | free shape | masked ≡ cut | saved ≡ reloaded, as | writes |
|---|---|---|---|---|---|---|---|---|"""


def table(families: Sequence[str], scratch: Path) -> str:
    """The table, one row for each family."""
    folders = [scratch / str(number) for number in range(len(families))]
    found = [check(family, folder) for family, folder in zip(families, folders, strict=True)]
    reloaded = reload(folders, [each.logits for each in found])
    rows = [row(*each) for each in zip(families, found, reloaded, strict=True)]
    return "\n".join([HEADER, *rows])


def main(*arguments: str) -> None:
    """Print the table, or write it into docs/models.md."""
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    families = [argument for argument in arguments if argument != "--write"] or list(FAMILIES)
    with tempfile.TemporaryDirectory() as scratch:
        text = table(families, Path(scratch))
    print(text)
    if "--write" in arguments:
        before, _, after = PAGE.read_text(encoding="utf-8").split(MARK)
        PAGE.write_text(f"{before}{MARK}\n{text}\n{MARK}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
