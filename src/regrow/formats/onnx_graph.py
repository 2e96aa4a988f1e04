"""ONNX through torch's own exporter, checked with onnxruntime before it is kept.

The graph is the whole model on a text at once: token ids [batch, sequence] to logits [batch, sequence, vocabulary],
both axes free, no KV cache. Texts of a batch that are shorter than the others are padded on the right.
"""

from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regrow.checkpoint.files import check_new, new_folder
from regrow.errors import InputError
from regrow.formats.source import copy_companions

TOLERANCE = 1e-3
"""Largest difference of logits, as a share of the largest logit (at least 1)."""
BATCH, SEQUENCE = 2, 8
"""Sizes that the graph is traced with; it is checked with others."""


@dataclass(frozen=True)
class Graph:
    """What onnxruntime computed with the file."""

    file: Path
    difference: float
    """Largest absolute difference of the logits from the model's, on tokens at random."""


class Logits(nn.Module):
    """A causal LM as a function of its token ids alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits [B, T, V] of ids [B, T]."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def write_onnx(model: PreTrainedModel, source: Path, out: Path) -> Graph:
    """Write `model.onnx` (weights beside it, if large) and the tokenizer's files into a folder.

    Args:
        model: on the CPU, in float32.
        source: the checkpoint's folder.
        out: a new or empty folder.

    Raises:
        InputError: if the folder is taken, or what onnxruntime computes is not what the model does.
    """
    check_new(out)
    rows = model.config.get_text_config().vocab_size
    chance = torch.Generator().manual_seed(0)
    with new_folder(out) as partial, torch.inference_mode():
        file = partial / "model.onnx"
        axes = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
        example = torch.randint(rows, (BATCH, SEQUENCE), generator=chance)
        torch.onnx.export(
            Logits(model).eval(), (example,), str(file), dynamo=True, verbose=False, dynamic_shapes=axes,
            input_names=["input_ids"], output_names=["logits"],
        )  # fmt: skip
        difference = 0.0
        for shape in ((1, 1), (BATCH + 1, SEQUENCE + 5)):
            ids = torch.randint(rows, shape, generator=chance)
            expected = model(input_ids=ids, use_cache=False).logits
            got = run_onnx(file, ids)
            difference = max(difference, float((got - expected).abs().max()))
        if difference > TOLERANCE * max(1.0, float(expected.abs().max())):
            raise InputError(f"onnxruntime's logits differ by {difference:.2g} from those of {source}; nothing written")
        copy_companions(source, partial)
    return Graph(out / "model.onnx", difference)


def run_onnx(file: Path, ids_BT: Tensor) -> Tensor:
    """Logits [B, T, V] that onnxruntime computes on the CPU."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"input_ids": ids_BT.numpy()})[0])
