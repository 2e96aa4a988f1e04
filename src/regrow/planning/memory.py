"""How much memory a run will need, told from shapes alone.

The model (bytes; P base parameters of b_w bytes, R adapter parameters, T tokens in a forward pass, L layers, d hidden
size, F FFN width, V vocabulary, b_a bytes of an activation):

    weights      b_w P (quantised linears: 1 or 0.516 each; offloaded matrices: one layer's, and this process' part)
    adapters     20 R: weight, gradient, AdamW's two moments and a copy of the best so far, in float32
    activations  b_a T L (8d + 4F)          checkpointed b_a T (L d + 8d + 4F)
    logits       2 T V b_a: they and their gradient; losses are taken a few positions at a time
    teacher      b_t P for a copy of the model, and its logits, T V b_a
    refits       24 C² + 24 C O for a consumer with C inputs and O outputs: moments, what is solved, weights, in
                 float64; 8 C² for each further expert of the layer that is measured along with it; 2 b_a d for each
                 token of the windows that are walked through
    finalists    of a search: a training step without the teacher, nothing cut
    the rest     128 MiB: what tracing and the libraries take once they are at work

It is coarse: it knows neither the allocator's fragments nor what a kernel keeps for itself, and takes every attention
for one that never holds T × T scores. On small LLaMAs on a CPU, which the constant was fitted to, scoring and training
came to 0.82 to 0.94 of what was measured, refits to 1.17 (`benchmarks/memory.py`). Take it for the order of magnitude
that tells a run that fits from one that does not.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from regrow.compensation.moments import at_once
from regrow.recipe import Recipe
from regrow.settings import Pruning
from regrow.structure.groups import Groups, Slice
from regrow.structure.quantised import weight_shape
from regrow.structure.trace import decoder_layers

ADAPTER_BYTES, GRADIENT_BYTES = 4, 4
MOMENTS_BYTES = 8
QUANTISED_BYTES = {"int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Of a weight; nf4 has a scale of one byte for every 64, and a float32 for 256 of those."""
OVERHEAD = 128 * 2**20


@dataclass(frozen=True)
class Sizes:
    """What the memory model wants to know of a model."""

    parameters: int
    block_parameters: int
    """Of the linears in the decoder layers."""
    matrices: int
    """All numbers of the decoder layers that can be offloaded."""
    adapters: int
    """Parameters of the LoRA factors."""
    dropped: int
    """Inputs of the adapted linears, summed up: what dropout keeps a second time, for each token."""
    gram: int
    """Squared inputs of every layer's consumers, summed up: what moments of inputs are kept in."""
    refit: int
    """Bytes that the dearest refit of a consumer takes; 0 if there is nothing to refit."""
    layers: int
    hidden: int
    channels: int
    vocabulary: int

    @classmethod
    def of(cls, model: PreTrainedModel, groups: Groups, recipe: Recipe) -> "Sizes":
        """Read off a model on any device, the meta device included, and its groups."""
        config, lora = model.config.get_text_config(), recipe.lora
        linears = {name: model.get_parameter(f"{name}.weight") for name in groups.linears}
        adapted = [w for name, w in linears.items() if not lora.targets or name.rpartition(".")[2] in lora.targets]
        in_experts = [(rank, model.get_parameter(name).shape) for name, rank in groups.expert_ranks(lora).items()]
        consumers = [group.consumers[0] for group in groups if group.consumers]
        alone = [consumer for consumer in consumers if consumer.expert is None]
        beside = Counter(consumer.parameter for consumer in consumers if consumer.expert is not None)
        return cls(
            parameters=groups.total_parameters,
            block_parameters=groups.block_parameters,
            matrices=sum(p.numel() for p in decoder_layers(model)[1].parameters() if p.ndim > 1),
            adapters=sum(lora.rank * sum(weight.shape) for weight in adapted)
            + sum(rank * count * (one + other) for rank, (count, one, other) in in_experts),
            dropped=sum(weight.shape[1] for weight in adapted) if lora.dropout else 0,
            gram=sum(consumer.index.size**2 for consumer in alone),
            refit=max((_refit(model, each, beside[each.parameter]) for each in consumers), default=0),
            layers=len(groups.layers),
            hidden=config.hidden_size,
            channels=max((group.units for group in groups if group.base_kind == "ffn"), default=0),
            vocabulary=config.vocab_size,
        )


def estimate_memory(
    sizes: Sizes,
    recipe: Recipe,
    needs: frozenset[str],
    weights: torch.dtype,
    activations: torch.dtype,
    processes: int = 1,
    streamed: bool = False,
) -> dict[str, int]:
    """Peak bytes by stage, above what the process holds before the model is loaded.

    Args:
        needs: of the criterion.
        weights: what the base is loaded in.
        activations: what is computed in, autocast considered.
        processes: those that may hold a part of the weights each; the figures are of one of them.
        streamed: whether the result is made from the original files tensor by tensor.

    Returns:
        `score`, `compensate` (the search included), `train finalists`, `train` and `save`, of the stages that the
        recipe has.
    """
    b_w, b_a = weights.itemsize, activations.itemsize
    tokens = recipe.training.batch_size * recipe.data.sequence_length
    removed = _removed(sizes, recipe.pruning)
    whole, left = _base(sizes, recipe, b_w, 0, processes), _base(sizes, recipe, b_w, removed, processes)
    logits = 2 * tokens * sizes.vocabulary * b_a
    step = _activations(sizes, recipe, tokens, b_a) + logits
    originals = recipe.training.ends_on_originals
    one_layer = b_w * sizes.matrices // sizes.layers if originals else 0
    found = {}
    if recipe.pruning.calibration_batches and needs:
        scored = recipe.override({"training.gradient_checkpointing": True}) if originals else recipe
        found["score"] = whole + one_layer + (ADAPTER_BYTES + GRADIENT_BYTES) * sizes.adapters
        found["score"] += _activations(sizes, scored, tokens, b_a) + logits
        found["score"] += b_w * sizes.block_parameters if "weight" in needs else 0
        found["score"] += 4 * sizes.block_parameters if "squares" in needs else 0
        found["score"] += 8 * sizes.gram if "inputs" in needs else 0
    if recipe.compensation.method != "none" and sizes.refit:
        walked = max(recipe.compensation.windows, recipe.search.windows if recipe.search.evaluations else 0)
        found["compensate"] = whole + one_layer + (ADAPTER_BYTES + GRADIENT_BYTES) * sizes.adapters
        found["compensate"] += sizes.refit + 2 * b_a * walked * recipe.data.sequence_length * sizes.hidden
    if recipe.finalists > 1:
        trained = (ADAPTER_BYTES + GRADIENT_BYTES + MOMENTS_BYTES) * sizes.adapters
        found["train finalists"] = whole + trained + step
    cut_at_once = recipe.pruning.schedule == "one-shot" and not recipe.pruning.decay_steps
    stays_whole = recipe.distillation.needs_whole_weights or recipe.training.quantization == "nf4" or originals
    present = left if cut_at_once and not stays_whole else whole
    # A snapshot of the best adapters is kept, too; on a GPU's host, but it is small.
    adapters = (ADAPTER_BYTES + GRADIENT_BYTES + MOMENTS_BYTES + ADAPTER_BYTES) * sizes.adapters
    copied, taught = _teacher(sizes, recipe, tokens, whole, b_a, b_w)
    asked = one_layer + tokens * sizes.vocabulary * b_a if originals else 0
    found["train"] = max(present + copied + adapters + step + taught, whole + copied + asked)
    stored = b_w if recipe.output.dtype == "auto" else getattr(torch, recipe.output.dtype).itemsize
    kept = sizes.parameters - removed  # in this process, and in the one that loads it anew
    merged = b_w * (sizes.parameters if recipe.training.quantized else kept)  # the original is loaded whole
    found["save"] = max(merged, b_w * kept + stored * kept)
    from_files = {"quantization": "none", "offload": "disk", "gradient_checkpointing": True, "original_share": 0.0}
    offloaded = recipe.override({f"training.{key}": value for key, value in from_files.items()})
    if streamed:  # the other process sees to itself
        found["save"] = 2 * _base(sizes, offloaded, b_w, removed, 1)
    if originals:  # from then on it is an offloaded model
        ending = estimate_memory(sizes, offloaded, frozenset(), weights, activations)["train"]
        found["train"] = max(found["train"], ending - OVERHEAD)
    return {stage: size + OVERHEAD for stage, size in found.items()}


def _refit(model: PreTrainedModel, consumer: Slice, experts: int) -> int:
    """Bytes that the refit of a consumer takes, which so many experts of its layer have (0: it is not an expert's)."""
    shape, inputs = weight_shape(model.get_parameter(consumer.parameter)), consumer.index.size
    outputs = shape[1 - consumer.axis] if consumer.expert is None else shape[3 - consumer.axis]  # experts' axis is 0
    ahead = min(experts, at_once(inputs)) - 1 if experts else 0
    return 24 * inputs * (inputs + outputs) + 8 * ahead * inputs**2


def _base(sizes: Sizes, recipe: Recipe, b_w: int, removed: int, processes: int) -> int:
    """Bytes of the frozen weights after so many parameters have been removed."""
    if recipe.training.offloaded:
        matrices = sizes.matrices - removed
        own = matrices / processes if recipe.training.offload == "shards" else 0
        return round(b_w * (sizes.parameters - sizes.matrices + matrices / sizes.layers + own))
    of_linear = QUANTISED_BYTES.get(recipe.training.quantization, b_w)
    return round(b_w * (sizes.parameters - sizes.block_parameters) + of_linear * (sizes.block_parameters - removed))


def _removed(sizes: Sizes, pruning: Pruning) -> int:
    """Parameters that will be gone; none where the recipe does not say it in advance."""
    known = pruning.target is None and pruning.basis == "block"
    return round(pruning.sparsity * sizes.block_parameters) if known else 0


def _activations(sizes: Sizes, recipe: Recipe, tokens: int, b_a: int) -> int:
    inside = 8 * sizes.hidden + 4 * sizes.channels
    dropped = tokens * sizes.dropped * (b_a + 1)  # the result and a mask of bytes
    if recipe.training.gradient_checkpointing:
        return b_a * tokens * (sizes.layers * sizes.hidden + inside) + dropped // sizes.layers
    return b_a * tokens * sizes.layers * inside + dropped


def _teacher(sizes: Sizes, recipe: Recipe, tokens: int, whole: int, b_a: int, b_w: int) -> tuple[int, int]:
    """Bytes of a copy of the model, which has `whole` bytes, and of what a lesson adds to a step."""
    settings = recipe.distillation
    if not settings.on:
        return 0, 0
    if settings.teacher == "cached":
        return 0, 0
    states = b_a * tokens * sizes.layers * sizes.hidden if settings.hidden_weight else 0
    if settings.teacher_dtype in QUANTISED_BYTES:
        of_linear = QUANTISED_BYTES[settings.teacher_dtype]
        whole = round(b_w * (sizes.parameters - sizes.block_parameters) + of_linear * sizes.block_parameters)
    elif settings.teacher_dtype != "auto" and not recipe.training.offloaded:
        whole = getattr(torch, settings.teacher_dtype).itemsize * sizes.parameters
    return 0 if settings.teacher == "self" else whole, tokens * sizes.vocabulary * b_a + states
