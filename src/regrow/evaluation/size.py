"""How big a model is, counted and not measured.

Not covered: weights that are packed by quantisation (one stored number is then several parameters).
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from regrow.checkpoint.load import most_positions
from regrow.structure.experts import is_experts
from regrow.structure.trace import decoder_layers, skeleton


@dataclass(frozen=True)
class Size:
    """Parameters, bytes and arithmetic of a model."""

    total: int
    """Parameters; a tied one counts once."""
    non_embedding: int
    """Parameters outside the embeddings (of tokens and of positions) and the output head."""
    bytes: int
    """Of all parameters and buffers in the types they are held in; tied ones once."""
    macs_per_token: int
    """Multiply-accumulates of a forward pass over one sequence, divided by its length.

    Every matrix product counts: the linears, the output head at every position, and attention's two products
    over the full square of positions (a causal kernel may skip half of it). It grows with `length`.
    """
    length: int
    """Tokens of the sequence that `macs_per_token` is about."""


def measure_size(model: PreTrainedModel, length: int = 256) -> Size:
    """Count parameters and bytes of the model, and the products of a pass over `length` tokens, if it takes so many.

    The pass runs on a copy on the meta device: no memory, no arithmetic, whatever the size of the model.
    """
    length = min(length, most_positions(model.config) or length)
    parameters = list(model.parameters())
    held = parameters + list(model.buffers())
    total = sum(p.numel() for p in parameters)
    return Size(
        total=total,
        non_embedding=total - _embedding_parameters(model),
        bytes=sum(t.numel() * t.element_size() for t in held),
        macs_per_token=_macs(model, length) // length,
        length=length,
    )


def _embedding_parameters(model: PreTrainedModel) -> int:
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings()
    if head is not None:
        modules.append(head)
    distinct = {id(p): p.numel() for module in modules for p in module.parameters()}
    return sum(distinct.values())


def _macs(model: PreTrainedModel, length: int) -> int:
    _, layers = decoder_layers(model)
    bones = skeleton(model, range(len(layers)))
    if any(is_experts(module) for module in bones.modules()):
        bones.set_experts_implementation("batched_mm")  # as many products as there are, whatever the routing
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    # With a mask, or with neither mask nor cache, some models look at values, which meta tensors do not have.
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        if bones.config.get_text_config() is bones.config:
            bones(input_ids=ids, use_cache=True)
        else:  # what joins text and images looks at values, too
            states = bones.get_decoder()(input_ids=ids, use_cache=True).last_hidden_state
            bones.get_output_embeddings()(states)
    return int(counter.get_total_flops()) // 2
