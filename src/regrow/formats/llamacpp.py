"""GGUF, llama.cpp's file: equal layers as the architecture `llama` or `qwen3`, uneven ones as `deci`.

    legend: N heads, D head size

Names, numbers and the file's layout come from the `gguf` package, which llama.cpp maintains. `llama` and `deci` turn
neighbouring pairs of a head's dimensions (transformers: one from either half), so rows of q and k move. Metadata that
llama.cpp would guess from other numbers (head size, above all) are written out.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from regrow.checkpoint.files import new_file
from regrow.errors import InputError
from regrow.formats.llamacpp_vocabulary import add_vocabulary
from regrow.formats.pad import check_even, widen, widest
from regrow.formats.source import Checkpoint, LayerWidths, layer_of, model_name

FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "llama", "qwen3": "qwen3"}
"""`model_type` -> llama.cpp's architecture for equal layers. Its own `qwen2` guesses the head size; `llama` is told."""
ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen3": gguf.MODEL_ARCH.QWEN3, "deci": gguf.MODEL_ARCH.DECI}
TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (gguf.GGMLQuantizationType.Q5_1, gguf.LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (gguf.GGMLQuantizationType.Q5_0, gguf.LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (gguf.GGMLQuantizationType.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
"""What the `gguf` package can write of the types for plain weights."""
K_TYPES = {
    "q2_k": gguf.LlamaFileType.MOSTLY_Q2_K,
    "q3_k_s": gguf.LlamaFileType.MOSTLY_Q3_K_S,
    "q3_k_m": gguf.LlamaFileType.MOSTLY_Q3_K_M,
    "q3_k_l": gguf.LlamaFileType.MOSTLY_Q3_K_L,
    "q4_k_s": gguf.LlamaFileType.MOSTLY_Q4_K_S,
    "q4_k_m": gguf.LlamaFileType.MOSTLY_Q4_K_M,
    "q5_k_s": gguf.LlamaFileType.MOSTLY_Q5_K_S,
    "q5_k_m": gguf.LlamaFileType.MOSTLY_Q5_K_M,
    "q6_k": gguf.LlamaFileType.MOSTLY_Q6_K,
}
"""What only llama.cpp can write; see `llamacpp_quantise`."""
ROPE_TYPES = {"llama": ("default", "linear", "llama3"), "qwen3": ("default",)}
"""RoPE whose frequencies no length changes, as far as the architecture reads factors of them."""
STORED = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Written:
    """What a GGUF file holds."""

    architecture: str
    type: str
    tensors: int
    padded: bool
    """Whether uneven layers were made equal with zeros, because no architecture can hold them otherwise."""
    wider: tuple[str, ...]
    """Tensors that are float16 instead, because their rows are no whole number of the type's blocks."""
    held: dict[str, int] | None = None
    """Of a K type: how many tensors are of which type."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Piece:
    """One tensor of the file, before it is read."""

    name: str
    shape: torch.Size
    type: gguf.GGMLQuantizationType
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return self.shape.numel() // block * size

    def data(self) -> NDArray[Any]:
        """The tensor as it stands in the file."""
        return gguf.quants.quantize(self.read().float().contiguous().numpy(), self.type)


def write_gguf(source: Checkpoint, out: Path, kind: str = "auto") -> Written:
    """Write a checkpoint as one GGUF file, a tensor in memory at a time.

    Args:
        kind: a key of `TYPES`; auto: as the checkpoint is stored. One-dimensional tensors are float32, embeddings
            and output at least q8_0.

    Raises:
        InputError: if the family, its RoPE or its tokenizer is none that llama.cpp and this writer share.
    """
    family = check_family(source)
    kind = STORED[source.outline(source.names[0]).dtype] if kind == "auto" else kind
    if kind not in TYPES:
        raise InputError(f"--type {kind!r}: choose auto, {', '.join((*TYPES, *K_TYPES))}")
    uneven = not source.even and family == "llama"
    architecture = "deci" if uneven else family
    # An empty half gets one unit of zeros: `deci` computes a layer wrongly, without a word, that has no FFN.
    widths = [widest([layer] if uneven else source.widths) for layer in source.widths]
    pieces = list(plan_pieces(source, architecture, widths, kind))
    with new_file(out) as unfinished:
        writer = gguf.GGUFWriter(unfinished, architecture)
        add_metadata(writer, source, widths, kind)
        add_vocabulary(writer, source)
        for piece in pieces:
            writer.add_tensor_info(piece.name, piece.shape, np.dtype(np.float32), piece.nbytes, piece.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for piece in pieces:
            writer.write_tensor_data(piece.data())
        writer.close()
    wanted = TYPES[kind][0]
    wider = tuple(
        piece.name for piece in pieces if _quantised(wanted) and len(piece.shape) == 2 and not _quantised(piece.type)
    )
    return Written(architecture, kind, len(pieces), not source.even and not uneven, wider)


def check_family(source: Checkpoint) -> str:
    """The architecture that computes what the checkpoint does, where all layers are equal.

    Raises:
        InputError: if there is none here.
    """
    described = source.config.to_dict()
    family = FAMILIES.get("llama" if is_llama(source) else source.config.model_type)
    if family is None:
        raise InputError(
            f"GGUF of {source.config.model_type!r} models is llama.cpp's own converter's to write: give --converter "
            f"PATH/convert_hf_to_gguf.py (this one knows {', '.join(FAMILIES)})"
        )
    rope = described["rope_parameters"]
    if rope["rope_type"] not in ROPE_TYPES[family] or rope.get("partial_rotary_factor", 1) != 1:
        raise InputError(f"RoPE {rope} of {source.folder} is not written here; give --converter")
    if described["hidden_act"] != "silu":
        raise InputError(f"llama.cpp computes silu in such models, {source.folder} {described['hidden_act']}")
    return family


def is_llama(source: Checkpoint) -> bool:
    """Whether a Granite's multipliers change nothing: it is a LLaMA with biases then, whatever it is called."""
    told = source.config.to_dict()
    ones = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    return (
        source.config.model_type == "granite"
        and all(told[key] == 1 for key in ones)
        and math.isclose(told["attention_multiplier"], source.head_dim**-0.5)
    )


def add_metadata(writer: gguf.GGUFWriter, source: Checkpoint, widths: Sequence[LayerWidths], kind: str) -> None:
    """Everything about the model but its tensors and its vocabulary; lists where layers differ."""
    config = source.config.to_dict()
    window = [config[key] for key in ("max_position_embeddings", "sliding_window") if config.get(key)]
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(model_name(source.folder))
    writer.add_file_type(TYPES[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(min(window))  # within a sliding window all attention is full attention
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(len(widths))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(source.head_dim)
    writer.add_key_length(source.head_dim)
    writer.add_value_length(source.head_dim)
    for add, values in (
        (writer.add_head_count, [layer.heads for layer in widths]),
        (writer.add_head_count_kv, [layer.kv_heads for layer in widths]),
        (writer.add_feed_forward_length, [layer.channels for layer in widths]),
    ):
        add(values if writer.arch == "deci" else values[0])


def plan_pieces(source: Checkpoint, architecture: str, widths: Sequence[LayerWidths], kind: str) -> Iterator[Piece]:
    """The file's tensors, in the checkpoint's order.

    Raises:
        InputError: if llama.cpp's architecture has no place for a tensor.
    """
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], len(widths))
    tied = source.config.get_text_config().tie_word_embeddings
    outlines = {}
    for name in source.names:
        if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise InputError(f"llama.cpp's {architecture!r} has no place for {name}; give --converter")
        read = partial(_read, source, name, widths, permuted=architecture != "qwen3")
        layer = layer_of(name)
        outline = source.outline(name)
        outlines[name] = outline if layer is None else widen(name, outline, source, widths[layer])
        yield Piece(target, outlines[name].shape, _type_of(target, outlines[name].shape, kind), read)
    if architecture != "deci":
        check_even(source.folder, outlines)
    if source.config.rope_parameters["rope_type"] != "default":
        factors = rope_factors(source)
        yield Piece("rope_freqs.weight", factors.shape, gguf.GGMLQuantizationType.F32, lambda: factors)


def _read(source: Checkpoint, name: str, widths: Sequence[LayerWidths], permuted: bool) -> Tensor:
    layer, tensor = layer_of(name), source.tensor(name)
    if layer is None:
        return tensor
    tensor = widen(name, tensor, source, widths[layer])
    if permuted and name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
        return pair_dimensions(tensor, source.head_dim)
    return tensor


def pair_dimensions(rows: Tensor, head_dim: int) -> Tensor:
    """Put row D/2 + i of every head behind its row i: the two that RoPE turns together.

    Args:
        rows: [N·D, …], weights or biases of q_proj or k_proj.
    """
    pairs = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def rope_factors(source: Checkpoint) -> Tensor:
    """[D/2] What the plain RoPE frequencies are divided by, such as Llama 3.1's."""
    rope = source.config.rope_parameters
    scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](source.config, torch.device("cpu"))
    plain = float(rope["rope_theta"]) ** -(torch.arange(0, source.head_dim, 2, dtype=torch.float64) / source.head_dim)
    return (plain / scaled.double()).float()


def _type_of(name: str, shape: torch.Size, kind: str) -> gguf.GGMLQuantizationType:
    """A tensor's type in a file of a type."""
    wanted = TYPES[kind][0]
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    if _quantised(wanted) and shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
        return gguf.GGMLQuantizationType.F16
    if _quantised(wanted) and name in ("token_embd.weight", "output.weight"):
        return gguf.GGMLQuantizationType.Q8_0
    return wanted


def _quantised(kind: gguf.GGMLQuantizationType) -> bool:
    return gguf.GGML_QUANT_SIZES[kind][0] > 1
