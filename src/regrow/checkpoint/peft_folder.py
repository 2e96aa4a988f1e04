"""Plain PEFT adapter folders: written from a run's factors, and carried from a pruned model to the whole one.

The last is LoRAM (arXiv 2502.13533): train small, infer large. Only LoRA's two factors are carried; folders with more
in them (DoRA's magnitudes, biases, whole modules) are refused.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor
from transformers import PreTrainedModel

from regrow.checkpoint.files import new_folder, write_bytes, write_json
from regrow.errors import InputError
from regrow.settings import Lora
from regrow.structure.adapters import ADAPTER, linear_shape
from regrow.structure.positions import IndexMap

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(r"base_model\.model\.(?P<linear>.+)\.lora_(?P<factor>[AB])\.weight")
BY_NAME = ("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "exclude_modules")
"""Settings that may speak of layers by their numbers."""


@dataclass(frozen=True)
class Adapter:
    """What a PEFT folder holds."""

    config: dict[str, Any]
    factors: dict[tuple[str, str], Tensor]
    """(linear, `A` or `B`) -> A `[rank, in]` or B `[out, rank]`."""

    @classmethod
    def of_run(cls, tensors: Mapping[str, Tensor], lora: Lora, base: str) -> "Adapter":
        """The adapter that a run has trained.

        Args:
            tensors: as `Trained.adapters`: factors by parameter name, and refitted parameters, which are the base's.
            base: where the base lies.
        """
        factors = {}
        for name, tensor in tensors.items():
            linear, _, rest = name.partition(".lora_")
            if rest:
                factors[linear, rest.removesuffix(f".{ADAPTER}.weight")] = tensor
        config = LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, bias="none", task_type="CAUSAL_LM",  # type: ignore[arg-type]
            target_modules=[], inference_mode=True, base_model_name_or_path=base,
        )  # fmt: skip
        targets = sorted({linear.rpartition(".")[2] for linear, _ in factors})
        return cls({**config.to_dict(), "target_modules": targets}, factors)

    @classmethod
    def read(cls, folder: Path) -> "Adapter":
        """Read a folder.

        Raises:
            InputError: if it is none of PEFT's, damaged, or holds more than LoRA factors.
        """
        try:
            config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            tensors = load_file(folder / WEIGHTS_FILE)
        except FileNotFoundError as error:
            raise InputError(
                f"{folder} holds no {CONFIG_FILE} and {WEIGHTS_FILE}; give a PEFT adapter's folder"
            ) from error
        except (ValueError, OSError, SafetensorError, RecursionError) as error:
            raise InputError(f"adapter {folder} is damaged: {str(error).splitlines()[0]}; get it anew") from error
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            raise InputError(f"adapter {folder}: {CONFIG_FILE} does not describe a LoRA adapter; get it anew")
        factors: dict[tuple[str, str], Tensor] = {}
        for key, tensor in tensors.items():
            if (found := KEY.fullmatch(key)) is None:
                raise InputError(
                    f"adapter {folder}: {key} is no LoRA factor of a linear; only those can be carried over"
                )
            factors[found["linear"], found["factor"]] = tensor
        for linear in sorted({linear for linear, _ in factors}):
            pair = [factors[linear, factor] for factor in "AB" if (linear, factor) in factors]
            a, b = ([tuple[int, ...](factor.shape) for factor in pair] + [(), ()])[:2]
            if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
                raise InputError(f"adapter {folder}: {linear} has no two factors of the same rank; get it anew")
        return cls(config, factors)

    def write(self, folder: Path) -> None:
        """Write a folder, which appears whole or not at all."""
        tensors = {
            f"base_model.model.{linear}.lora_{f}.weight": t.contiguous() for (linear, f), t in self.factors.items()
        }
        with new_folder(folder) as partial:
            write_json(partial / CONFIG_FILE, self.config)
            write_bytes(partial / WEIGHTS_FILE, tensors_to_bytes(tensors, {"format": "pt"}))

    def scatter(self, positions: IndexMap, model: PreTrainedModel, name: str) -> "Adapter":
        """This adapter of a pruned model as one of the whole model, with zeros where something was removed.

        With the removed units gated off, the whole model then computes what the pruned one does with this adapter.

        Args:
            positions: from the whole model to the pruned one.
            model: the whole one; its shapes count.
            name: of the whole model, for the config.

        Raises:
            InputError: if a factor does not fit the pruned model, or the config speaks of layers whose numbers change.
        """
        factors = {}
        for (linear, factor), tensor in self.factors.items():
            before = positions.name_before(linear)
            axis = 1 if factor == "A" else 0
            kept = (positions.inputs if factor == "A" else positions.outputs).get(before)
            size = _shape(model, before)[axis]
            if tensor.shape[axis] != (size if kept is None else len(kept.positions)):
                raise InputError(
                    f"the adapter is not of a model pruned by this plan: {linear} has "
                    f"{size if kept is None else len(kept.positions)} {'inputs' if axis else 'outputs'} there, "
                    f"{tensor.shape[axis]} in the adapter"
                )
            factors[before, factor] = tensor if kept is None else kept.scatter(tensor, axis)
        config = {**self.config, "base_model_name_or_path": name}
        if None in positions.layers.values():
            if used := [key for key in BY_NAME if config.get(key)]:
                raise InputError(f"the adapter's config has {used[0]}, and layers change their numbers; take it out")
            config["target_modules"] = sorted({linear for linear, _ in factors})
        return Adapter(config, factors)


def _shape(model: PreTrainedModel, linear: str) -> tuple[int, int]:
    """`(outputs, inputs)` of a linear."""
    try:
        return linear_shape(model.get_submodule(linear))
    except (AttributeError, ValueError) as error:
        raise InputError(
            f"the adapter has factors for {linear}, which is no linear of {type(model).__name__}"
        ) from error
