"""Plain PEFT adapter folders: written from a run's factors, and carried from a pruned model to the whole one.

The last is LoRAM (arXiv 2502.13533): train small, infer large. Only LoRA's two factors are carried; folders with more
in them (DoRA's magnitudes, biases, whole modules) are refused.

Factors of experts PEFT keeps as if for one linear: A as `[experts rank, in]`, B as `[out, rank experts]`, below
wrappers around wrappers, the module's last product outermost. Their names tell the depth, `target_parameters` the
products.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor
from transformers import PreTrainedModel

from regrow.checkpoint.files import new_folder, write_bytes, write_json
from regrow.errors import InputError
from regrow.settings import Lora
from regrow.structure.adapters import adapted_module, adapted_shape, is_turned
from regrow.structure.expert_lora import ADAPTER, adapted_parameter, adapter_name
from regrow.structure.positions import IndexMap, Kept

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(r"base_model\.model\.(?P<linear>.+?)(?P<depth>(\.base_layer)*)\.lora_(?P<factor>[AB])\.weight")
PRODUCTS = ("gate_up_proj", "up_proj", "down_proj")
"""Of a module of experts, in its order."""
ONCE_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj")
"""Of linears of these names PEFT takes a mixture's for its experts', as they once were; not of their parameters."""
BY_NAME = ("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "exclude_modules")
"""Settings that may speak of layers by their numbers."""


@dataclass(frozen=True)
class Adapter:
    """What a PEFT folder holds."""

    config: dict[str, Any]
    factors: dict[tuple[str, str], Tensor]
    """(adapter, `A` or `B`) -> A `[rank, in]` or B `[out, rank]`; of experts', with an axis for them before."""

    @classmethod
    def of_run(cls, tensors: Mapping[str, Tensor], lora: Lora, base: str, mixture: bool = False) -> "Adapter":
        """The adapter that a run has trained.

        Args:
            tensors: as `Trained.adapters`: factors by parameter name, and refitted parameters, which are the base's.
            base: where the base lies.
            mixture: whether that is one of experts.
        """
        factors = {}
        for name, tensor in tensors.items():
            linear, _, rest = name.partition(".lora_")
            if rest:
                factors[linear, rest.removesuffix(f".{ADAPTER}.weight")] = tensor
        modules, parameters = _targets({adapter for adapter, _ in factors}, mixture)
        ranks = {_tail(adapter): factors[adapter, "A"].shape[-2] for adapter in modules}
        ranks |= {_tail(name): factors[adapter, "A"].shape[-2] for adapter, name in parameters.items()}
        # PEFT warns of patterns that match no linear: so the rank is the experts', and those of a rank share a pattern.
        rank = min(ranks.values(), default=lora.rank)
        alike = {each: [name for name, own in ranks.items() if own == each] for each in sorted(set(ranks.values()))}
        others = {"|".join(names): each for each, names in alike.items() if each != rank}
        config = LoraConfig(
            r=rank, lora_alpha=lora.alpha * rank / lora.rank, bias="none", task_type="CAUSAL_LM",  # type: ignore[arg-type]
            lora_dropout=0.0 if parameters else lora.dropout,  # PEFT knows none at parameters
            target_modules=sorted({adapter.rpartition(".")[2] for adapter in modules}),
            target_parameters=sorted(set(map(_tail, parameters.values()))) or None, rank_pattern=others,
            alpha_pattern={name: lora.alpha * each / lora.rank for name, each in others.items()},
            inference_mode=True, base_model_name_or_path=base,
        )  # fmt: skip
        targets = sorted(config.target_modules or ())  # it keeps a set
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
            try:
                adapter, factor = _named_here(config, found, tensor)
            except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, re.error) as error:
                reason = str(error).splitlines()[0]
                raise InputError(
                    f"adapter {folder}: {key} does not fit {CONFIG_FILE} ({reason}); get it anew"
                ) from error
            factors[adapter, found["factor"]] = factor
        for linear in sorted({linear for linear, _ in factors}):
            pair = [factors[linear, factor] for factor in "AB" if (linear, factor) in factors]
            a, b = ([tuple[int, ...](factor.shape) for factor in pair] + [(), ()])[:2]
            axes = 2 if adapted_parameter(linear) is None else 3
            if len(a) != axes or len(b) != axes or a[-2] != b[-1] or a[:-2] != b[:-2]:
                raise InputError(f"adapter {folder}: {linear} has no two factors of the same rank; get it anew")
        return cls(config, factors)

    def write(self, folder: Path) -> None:
        """Write a folder, which appears whole or not at all."""
        tensors = {}
        for (adapter, factor), tensor in self.factors.items():
            name = adapter
            if (parameter := adapted_parameter(adapter)) is not None:
                module, _, product = parameter.rpartition(".")
                products = [each for each in PRODUCTS if (adapter_name(f"{module}.{each}"), factor) in self.factors]
                name = module + ".base_layer" * (len(products) - 1 - products.index(product))
                tensor = tensor.flatten(0, 1) if factor == "A" else tensor.permute(1, 2, 0).flatten(1)
            tensors[f"base_model.model.{name}.lora_{factor}.weight"] = tensor.contiguous()
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
            for axis, what, size, kept in _axes(model, positions, before, factor):
                left = size if kept is None else kept.left
                if tensor.shape[axis] != left:
                    raise InputError(
                        f"the adapter is not of a model pruned by this plan: {linear} has {left} {what} there, "
                        f"{tensor.shape[axis]} in the adapter"
                    )
                tensor = tensor if kept is None else kept.scatter(tensor, axis)
            factors[before, factor] = tensor
        config = {**self.config, "base_model_name_or_path": name}
        if None in positions.layers.values():
            if used := [
                key for key in BY_NAME if config.get(key) and re.search("[0-9]", json.dumps(list(config[key])))
            ]:
                raise InputError(f"the adapter's config has {used[0]}, and layers change their numbers; take it out")
            modules, parameters = _targets({adapter for adapter, _ in factors}, bool(config.get("target_parameters")))
            config["target_modules"] = sorted(modules)
            if parameters:
                config["target_parameters"] = sorted(parameters.values())
        return Adapter(config, factors)


def _targets(adapters: Collection[str], mixture: bool) -> tuple[list[str], dict[str, str]]:
    """Adapters that PEFT puts around a module, and those that it puts on a parameter, with its name."""
    parameters = {}
    for adapter in sorted(adapters):
        if (parameter := adapted_parameter(adapter)) is not None:
            parameters[adapter] = parameter
        elif mixture and adapter.rpartition(".")[2] in ONCE_OF_EXPERTS:
            parameters[adapter] = f"{adapter}.weight"
    return sorted(set(adapters) - parameters.keys()), parameters


def _tail(name: str) -> str:
    """Of a dotted name what tells it from others in a layer."""
    return ".".join(name.split(".")[-3 if name.endswith(".weight") else -2 :])


def _axes(
    model: PreTrainedModel, positions: IndexMap, adapter: str, factor: str
) -> list[tuple[int, str, int, Kept | None]]:
    """Of a factor of the whole model, axes that a cut may change: what lies along each, how much, what is left of it.

    Those within experts come before the experts themselves.
    """
    try:
        *experts, out, into = adapted_shape(model, adapter)
        turned = is_turned(adapted_module(model, adapter))
    except (AttributeError, ValueError) as error:
        raise InputError(
            f"the adapter has factors for {adapter}, which is no linear of {type(model).__name__}"
        ) from error
    what, size = ("inputs", into) if factor == "A" else ("outputs", out)
    if (parameter := adapted_parameter(adapter)) is None:
        kept = (positions.inputs if factor == "A" else positions.outputs).get(adapter)
        return [(1 if factor == "A" else 0, what, size, kept)]
    axis = 2 if (factor == "A") != turned else 1  # of the weights
    inside = (2 if factor == "A" else 1, what, size, positions.axes.get((parameter, axis)))
    return [inside, (0, "experts", experts[0], positions.axes.get((parameter, 0)))]


def _named_here(config: dict[str, Any], found: re.Match[str], tensor: Tensor) -> tuple[str, Tensor]:
    """The name of an adapter of which a file has a factor, and the factor as we keep it."""
    module, wrappers = found["linear"], found["depth"]
    products, depth = _products(config, module), wrappers.count(".")
    if depth >= len(products):
        return module + wrappers, tensor
    parameter = f"{module}.{products[-1 - depth]}"
    return adapter_name(parameter), _apart(tensor, found["factor"], _rank(config, parameter))


def _products(config: dict[str, Any], module: str) -> list[str]:
    """Of the parameters that a config has PEFT adapt, those of one module; none if it is a linear."""
    targets = config.get("target_parameters") or []
    return [each for each in PRODUCTS if any(f".{module}.{each}".endswith(f".{target}") for target in targets)]


def _rank(config: dict[str, Any], name: str) -> int:
    """The rank that PEFT gives what is called so."""
    patterns = config.get("rank_pattern") or {}
    return int(patterns.get(get_pattern_key(list(patterns), name), config["r"]))


def _apart(tensor: Tensor, factor: str, rank: int) -> Tensor:
    """A factor of experts, as PEFT keeps it, with an axis for them."""
    if factor == "A":
        return tensor.view(-1, rank, tensor.shape[1])
    return tensor.view(tensor.shape[0], rank, -1).permute(2, 0, 1)
