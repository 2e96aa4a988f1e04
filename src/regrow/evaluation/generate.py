"""A sample of a model's text, for the eye."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regrow.checkpoint.load import most_positions
from regrow.evaluation.perplexity import inference


def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int = 60) -> str:
    """The text that the model greedily writes after the prompt, the prompt itself not included.

    At most `new_tokens` tokens, fewer if the model ends the text; the same model writes the same each time.
    Special tokens are left out. No chat template is applied. Where prompt and new tokens together exceed the model's
    positions, the prompt's beginning is left out.
    """
    encoded = tokenizer(prompt, return_tensors="pt")
    ids_1T = encoded["input_ids"].to(model.device)
    positions = most_positions(model.config)
    if positions is not None:
        new_tokens = min(new_tokens, positions - 1)
        ids_1T = ids_1T[:, new_tokens - positions :]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    writer: Any = model  # transformers declares `generate` on each model class, not on their common one
    with inference(model):
        written_1T = writer.generate(
            input_ids=ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            # Not by `max_new_tokens`: transformers warns if the checkpoint sets `max_length` besides.
            max_length=ids_1T.shape[1] + new_tokens,
            max_new_tokens=None,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
        )
    # Decoded together and then cut: many tokenizers drop the space in front of the first token they decode.
    read, whole = (tokenizer.decode(ids[0], skip_special_tokens=True) for ids in (ids_1T, written_1T))
    return str(whole)[len(str(read)) :]
