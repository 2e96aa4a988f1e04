"""The families of the zoo: a config of each as small as can be, with all that makes its class what it is."""

from collections.abc import Callable

import transformers as hf
from packaging.version import Version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

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
    "Granite SWA": lambda: CONFIG_MAPPING["granite_swa"](**GQA, **LOCAL),
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
    "Granite MoE SWA": lambda: CONFIG_MAPPING["granitemoe_swa"](
        **GQA, **LOCAL, num_local_experts=4, num_experts_per_tok=2
    ),
    "Mellum": lambda: hf.MellumConfig(**GQA, **LOCAL, **EXPERTS, head_dim=12, moe_intermediate_size=16),
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

NEWER: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "Apertus 1.5": lambda: CONFIG_MAPPING["apertus1p5_text"](**GQA, rope_parameters={"rope_theta": 1e4}),
    "EXAONE 3.5": lambda: CONFIG_MAPPING["exaone"](**GQA),
    "Lara Mini": lambda: CONFIG_MAPPING["lara_mini"](
        **FOUR, **DELTA, **EXPERTS, sliding_window=6, moe_intermediate_size=16, shared_expert_intermediate_size=24
    ),
    "Sarvam MoE": lambda: CONFIG_MAPPING["sarvam_moe"](**GQA, **ROUTED, head_dim=12),
    "Sarvam MLA": lambda: CONFIG_MAPPING["sarvam_mla"](**MHA, **LATENT, num_key_value_heads=8, first_k_dense_replace=1),
}
"""Families that transformers has had since 5.24; regrow takes older versions, too."""
if Version(hf.__version__) >= Version("5.24"):
    FAMILIES |= NEWER
