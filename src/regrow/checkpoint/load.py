"""Models and tokenizers from a folder or the hub: safetensors only, no remote code."""

import re
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from regrow.checkpoint.tensors import weight_files
from regrow.data.source import looks_like_path
from regrow.errors import InputError, first_sentence
from regrow.structure.adapters import is_linear
from regrow.structure.quantise import NF4_BLOCK, check_bitsandbytes, quantisable
from regrow.structure.quantised import Quantization, settle


def pick_device(name: str = "auto") -> torch.device:
    """The device a recipe asks for; `auto` is the first CUDA GPU, else the CPU.

    Raises:
        InputError: if there is no such device here, or none that has float64.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device).item()
    except TypeError as error:  # so mps says it
        raise InputError(
            f"device {name!r} has no float64, in which losses and scores are added up; choose cpu, cuda or auto"
        ) from error
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} is not to be had here; choose cpu, cuda, cuda:1, … or auto") from error
    return device


def load_model(
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    quantization: Quantization | Literal["none"] = "none",
) -> PreTrainedModel:
    """A decoder-only language model.

    Args:
        name: a folder, or a repository on the hub.
        dtype: what to compute in; by default float32 on a CPU, else the checkpoint's own.
        quantization: how the weights of the decoder layers' linears are kept: none, int8 or nf4. The config says
            nothing of it.

    Raises:
        InputError: if there is no such model, it is not a causal LM, sees what follows a token, or its files are
            damaged.
    """
    config = load_config(name, trust_remote_code)
    if Path(name).is_dir():
        weight_files(Path(name))
    dtype = dtype or compute_dtype(config, torch.device(device))
    ways: dict[str, Any] = {}
    if quantization != "none":
        ways = _quantised(load_skeleton(name, trust_remote_code), quantization, dtype, torch.device(device))
    try:
        # Without `ignore_mismatched_sizes` a tensor that does not fit is an error that does not say which one.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True, output_loading_info=True, **ways,
        )  # fmt: skip
    except (SafetensorError, OSError) as error:
        raise InputError(f"weights of {name} are damaged or missing: {_reason(error)}; get them anew") from error
    except Exception as error:
        raise InputError(f"model {name} cannot be loaded: {_reason(error)}") from error
    model, report = loaded
    _check_complete(name, report)
    if quantization != "none":
        settle(model)
        del model.config.quantization_config  # what comes of the model will be plain
    model = model.to(device).eval()
    if getattr(config, "is_decoder", True) is False:  # some causal models say so, too
        _check_causal(name, model)
    return model  # type: ignore[no-any-return]


def compute_dtype(config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """What a model is computed in unless something else is asked for: float32 on a CPU, else as it is stored."""
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    return torch.float32 if device.type == "cpu" else stored


def _quantised(
    bones: PreTrainedModel, quantization: Quantization, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """What makes transformers quantise the linears of the decoder layers as it loads them (see `quantisable`).

    Args:
        bones: the model without its weights.
        dtype: what 4-bit weights are turned into for a product.

    Raises:
        InputError: if it would quantise none.
    """
    check_bitsandbytes("training.quantization", quantization)
    chosen = quantisable(bones, quantization, device)
    # transformers replaces no linear of a subclass: it may compute otherwise.
    if not any(type(module) is nn.Linear or isinstance(module, Conv1D) for module in chosen.values()):
        why = "they are of a class of their own" if chosen else f"no row of theirs is a multiple of {NF4_BLOCK} long"
        raise InputError(
            f"training.quantization={quantization}: the linears of this {bones.config.model_type!r} model cannot be "
            f"kept so on {device.type}, for {why}; set another, or none"
        )
    left_alone = [re.escape(name) for name, module in bones.named_modules() if is_linear(module) and name not in chosen]
    config = BitsAndBytesConfig(
        load_in_8bit=quantization == "int8",
        load_in_4bit=quantization == "nf4",
        llm_int8_skip_modules=left_alone,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _check_complete(name: str, report: dict[str, Any]) -> None:
    """Refuse a model of which transformers has filled a part with random numbers."""
    wrong = [f"there is no {key}" for key in sorted(report["missing_keys"])] + [
        f"{key} is {list(stored)}, not {list(wanted)}" for key, stored, wanted in sorted(report["mismatched_keys"])
    ]
    if wrong:
        raise InputError(
            f"weights of {name} do not fit its config.json: {wrong[0]} ({len(wrong)} such tensors); get both anew"
        )


@torch.no_grad()
def _check_causal(name: str, model: PreTrainedModel) -> None:
    """Refuse a model whose predictions change with what comes after them: an encoder for masked tokens."""
    first, second = (model(torch.tensor([[3, 4, 5, last]], device=model.device)).logits[:, :-1] for last in (6, 7))
    if not torch.equal(first, second):
        raise InputError(
            f"{name} sees the tokens that it is to predict, as models for masked tokens do; regrow prunes models that "
            'do not: if it was trained to be one, set "is_decoder": true in its config.json'
        )


def load_skeleton(name: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without its weights, on the meta device: for tracing, whatever its size.

    Raises:
        InputError: as `load_model`.
    """
    config = load_config(name, trust_remote_code)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise InputError(f"config.json of {name} describes no model that can be built: {_reason(error)}") from error
    return model


def weights_folder(name: str) -> Path:
    """The folder of a checkpoint's safetensors files; from the hub they are downloaded.

    Raises:
        InputError: if they cannot be.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.safetensors.index.json"]))
    except Exception as error:
        raise InputError(f"weights of {name} do not come from the hub: {_reason(error)}; try again") from error


def load_config(name: str, trust_remote_code: bool = False):  # type: ignore[no-untyped-def]
    """The config of a causal LM; see `load_model`."""
    own_code = "auto_map" in _read_config(name)
    if own_code and not trust_remote_code:
        raise _own_code(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise InputError(
            f"config.json of {name} cannot be used: {_reason(error)}; get it anew, or a newer transformers"
        ) from error
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    named = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)]
    supported = own_code or any(name in causal for name in named)
    if config.is_encoder_decoder or not supported:
        raise InputError(f"{name} is a {named[0]}; regrow prunes decoder-only language models (…ForCausalLM)")
    return config


def check_unquantised(name: str) -> None:
    """Refuse a checkpoint whose weights have been quantised: it is the originals that are cut.

    Raises:
        InputError: if it is one.
    """
    if (quantised := _read_config(name).get("quantization_config")) is not None:
        method = quantised.get("quant_method", "by an unknown method") if isinstance(quantised, dict) else quantised
        raise InputError(
            f"{name} is quantised ({method}); give the checkpoint it was made of, and --quantize if memory is short "
            "(docs/models.md tells how to write one where there is none)"
        )


def _own_code(name: str) -> InputError:
    return InputError(
        f"{name} runs Python files of its own; read them, then give --trust-remote-code to inspect, evaluate or "
        "bench it (prune and analyze take no such models)"
    )


def _read_config(name: str) -> dict[str, Any]:
    """`config.json` as it stands: the first thing that is read of a model, whatever is wanted of it."""
    path = Path(name)
    if path.is_file():
        raise InputError(f"{name} is a file; give the folder of a Hugging Face checkpoint")
    if looks_like_path(name) and not path.is_dir():
        raise InputError(f"there is no model folder {name}; give a checkpoint's folder, or a repository on the hub")
    if (path / "model" / "config.json").is_file() and not (path / "config.json").is_file():
        raise InputError(f"{name} is a run's folder, which keeps its checkpoint in {path / 'model'}; give that")
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{name} holds no config.json; give the folder of a Hugging Face checkpoint")
    try:
        described: dict[str, Any] = PretrainedConfig.get_config_dict(name)[0]
    except Exception as error:
        if path.is_dir():
            raise InputError(f"config.json of {name} cannot be read: {_reason(error)}; get it anew") from error
        raise InputError(
            f"there is no folder {name}, and no model of that name comes from the hub: {_reason(error)}; "
            "check the name and the connection"
        ) from error
    if not isinstance(described, dict):
        raise InputError(f"config.json of {name} is not a JSON object; get it anew")
    return described


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that lies with a model.

    Raises:
        InputError: if there is none, or it is damaged.
    """
    described = _read_config(name)
    if Path(name).is_dir() and not any(Path(name).glob("*token*")):
        raise InputError(f"{name} holds no tokenizer; put tokenizer.json and tokenizer_config.json of its model there")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        if "auto_map" in described and not trust_remote_code:
            raise _own_code(name) from error
        raise InputError(f"tokenizer of {name} cannot be used: {_reason(error)}; get its files anew") from error
    return tokenizer


def output_dtype(name: str, wanted: str = "auto") -> torch.dtype:
    """What a checkpoint is to be stored in; `auto`: as its config says it is now, float32 if it does not say."""
    dtype = load_config(name, trust_remote_code=False).dtype if wanted == "auto" else getattr(torch, wanted)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def most_positions(config: PretrainedConfig) -> int | None:
    """Tokens of the longest text that a model was made for; None if it states no limit."""
    text = config.get_text_config()
    stated = (getattr(text, key, None) for key in ("max_position_embeddings", "max_seq_len"))
    return next((positions for positions in stated if positions is not None), None)


def check_length(config: PretrainedConfig, length: int) -> None:
    """Refuse windows that are longer than what the model was made for: figures on them mean nothing.

    Raises:
        InputError: if they are.
    """
    longest = most_positions(config)
    if longest is not None and length > longest:
        raise InputError(f"a window of {length} tokens is longer than the {longest} positions of the model; shorten it")


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer that has more tokens than the model has embeddings.

    Raises:
        InputError: if it has.
    """
    rows = model.get_parameter(_embedding_name(model)).shape[0]
    if len(tokenizer) > rows:
        raise InputError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the model embeds {rows}; put the model's own there"
        )


def _embedding_name(model: PreTrainedModel) -> str:
    embedding = model.get_input_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is embedding)


def _reason(error: Exception) -> str:
    """The first sentence of a library's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return first_sentence(words) or type(error).__name__
