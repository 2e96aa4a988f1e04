"""Checkpoints of any size with random weights, to measure on: written tensor by tensor, never held in memory."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import AutoModelForCausalLM, LlamaConfig

import regrow
from regrow.checkpoint.files import write_json
from regrow.checkpoint.load import load_tokenizer
from regrow.checkpoint.tensors import write_tensors

TOKENIZER = Path(regrow.__file__).parent / "demo" / "model"


def write_random_checkpoint(config: LlamaConfig, folder: Path, shard_size: str, device: str = "cpu") -> None:
    """A LLaMA in bfloat16 with the demo's tokenizer: norms of ones, matrices of N(0, 0.02²).

    Args:
        config: of the model.
        folder: where it goes.
        shard_size: of a file at most, as transformers has it ("4GB").
        device: where the numbers are drawn.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    load_tokenizer(str(TOKENIZER)).save_pretrained(folder)
    chance = torch.Generator(device).manual_seed(0)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    def values(names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            made = torch.ones(shapes[name], dtype=torch.bfloat16, device=device)
            yield name, (made.normal_(0, 0.02, generator=chance) if made.ndim > 1 else made).cpu()

    shards = split_torch_state_dict_into_shards(model.state_dict(), max_shard_size=shard_size)
    for file, names in shards.filename_to_tensors.items():
        write_tensors(folder / file, {name: (torch.bfloat16, shapes[name]) for name in names}, values(names))
    index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    write_json(folder / "model.safetensors.index.json", index)
