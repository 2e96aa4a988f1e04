"""Make a mixture of experts out of a small dense Llama, to prune and to measure on.

    python benchmarks/upcycle.py MODEL --out FOLDER [--experts 4] [--seed 0]

Every FFN becomes so many copies of itself and a random router that sends each token to two of them (sparse upcycling,
arXiv 2212.05055), as a Mixtral. Untrained it computes what the dense model does, with all knowledge several times over.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
"""Settings that a Mixtral and a Llama have in common."""


def upcycle(model: str, experts: int, seed: int) -> MixtralForCausalLM:
    """A Mixtral whose experts are all the dense model's FFN."""
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(seed)
    described = {key: value for key, value in dense.config.to_dict().items() if key in SHARED}
    mixture = MixtralForCausalLM(MixtralConfig(**described, num_local_experts=experts, num_experts_per_tok=2))
    missing, _ = mixture.load_state_dict(dense.state_dict(), strict=False)
    assert all(".mlp." in name for name in missing)
    with torch.no_grad():
        for layer, source in zip(mixture.model.layers, dense.model.layers, strict=True):
            gate_up = torch.cat([source.mlp.gate_proj.weight, source.mlp.up_proj.weight])
            layer.mlp.experts.gate_up_proj.copy_(gate_up.expand(experts, -1, -1))
            layer.mlp.experts.down_proj.copy_(source.mlp.down_proj.weight.expand(experts, -1, -1))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert (mixture.eval()(ids).logits - dense.eval()(ids).logits).abs().max() < 1e-3
    mixture.generation_config = dense.generation_config
    return mixture


def main() -> None:
    """Upcycle as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    upcycle(arguments.model, arguments.experts, arguments.seed).save_pretrained(arguments.out)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
