"""Choosing linears to quantise, and quantising one; what is so kept is spoken to through `quantised.py`."""

import logging
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from regrow.errors import InputError
from regrow.structure.adapters import linear_shape
from regrow.structure.offload import Offloaded
from regrow.structure.quantised import Quantization, kept_as, settle
from regrow.structure.trace import decoder_layers

NF4_BLOCK = 64


def check_bitsandbytes(setting: str, kind: str) -> None:
    """See that the library is there.

    Args:
        setting: what asks for it.

    Raises:
        InputError: if not.
    """
    if not find_spec("bitsandbytes"):
        raise InputError(f"{setting}={kind} needs bitsandbytes: pip install 'regrow[quant]', or set another")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it warns at every product of an 8-bit linear


def quantisable(model: PreTrainedModel, kind: Quantization, device: torch.device) -> dict[str, nn.Module]:
    """The linears of the decoder layers by name, those inside of LoRA included, adapters not.

    On a CPU, 4-bit linears whose rows do not end where blocks of scales do are left out: bitsandbytes' kernel would
    read the wrong scales.
    """
    inside, by_blocks = decoder_layers(model)[0], kind == "nf4" and device.type == "cpu"
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and name.startswith(f"{inside}.")
        and ".lora_" not in name
        and not (by_blocks and linear_shape(module)[1] % NF4_BLOCK)
    }


@torch.no_grad()
def quantise(linear: nn.Module, kind: Quantization, compute: torch.dtype) -> nn.Module:
    """A frozen linear that computes with the same weight, rounded.

    Args:
        linear: a plain one, or a Conv1D.
        compute: what a 4-bit weight is turned into for a product.
    """
    bnb: Any = import_module("bitsandbytes")
    rows, columns = linear_shape(linear)
    weight = linear.get_parameter("weight").detach()
    if isinstance(linear.weight, Offloaded):
        weight = linear.weight.bring()
    assert kept_as(weight) is None, "a weight is rounded once"
    device, values = weight.device, (weight.T if isinstance(linear, Conv1D) else weight).contiguous()
    bias: nn.Parameter | None = linear.bias  # type: ignore[assignment]
    made: nn.Module
    if kind == "int8":
        made = bnb.nn.Linear8bitLt(columns, rows, bias is not None, has_fp16_weights=False, device="meta")
        made.weight = bnb.nn.Int8Params(values.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
    else:
        made = bnb.nn.Linear4bit(
            columns, rows, bias is not None, compute, compress_statistics=True, quant_type="nf4", device="meta"
        )
        made.weight = bnb.nn.Params4bit(
            values, requires_grad=False, quant_type="nf4", compress_statistics=True, module=made
        ).to(device)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    settle(made)
    return made
