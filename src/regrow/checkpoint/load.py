"""Models and tokenizers from a folder or the hub: safetensors only, no remote code."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from regrow.errors import InputError


def pick_device(name: str = "auto") -> torch.device:
    """The device a recipe asks for; `auto` is the first GPU, else the CPU.

    Raises:
        InputError: if there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} is not to be had here") from error
    return device


def load_model(
    name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A decoder-only language model.

    Args:
        name: a folder, or a repository on the hub.
        dtype: what to compute in; by default float32 on a CPU, else the checkpoint's own.

    Raises:
        InputError: if there is no such model, it is not a causal LM, or its files are damaged.
    """
    config = load_config(name, trust_remote_code)
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else config.dtype or torch.bfloat16
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise InputError(f"model {name} cannot be loaded: {_first_line(error)}") from error
    return model.to(device).eval()  # type: ignore[no-any-return, arg-type]


def load_skeleton(name: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without its weights, on the meta device: for tracing, whatever its size.

    Raises:
        InputError: as `load_model`.
    """
    config = load_config(name, trust_remote_code)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model


def load_config(name: str, trust_remote_code: bool = False):  # type: ignore[no-untyped-def]
    """The config of a causal LM; see `load_model`."""
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise InputError(f"there is no model folder {name}")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise InputError(f"{name} holds no config.json; give the folder of a Hugging Face checkpoint")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise InputError(
            f"model {name} is neither a usable folder nor to be had from the hub: {_first_line(error)}"
        ) from error
    own_code = "auto_map" in config.to_dict()
    if own_code and not trust_remote_code:
        raise InputError(f"{name} brings Python files of its own; read them, then say --trust-remote-code")
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    named = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)]
    supported = own_code or any(name in causal for name in named)
    if config.is_encoder_decoder or not supported:
        raise InputError(f"{name} is a {named[0]}; regrow prunes decoder-only language models (…ForCausalLM)")
    return config


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that lies with a model.

    Raises:
        InputError: if there is none, or it is damaged.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise InputError(f"{name} has no usable tokenizer: {_first_line(error)}") from error
    return tokenizer


def stored_dtype(name: str) -> torch.dtype:
    """The dtype a checkpoint is stored in, as its config says; float32 if it does not."""
    dtype = load_config(name, trust_remote_code=False).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer that has more tokens than the model has embeddings.

    Raises:
        InputError: if it has.
    """
    rows = model.get_parameter(_embedding_name(model)).shape[0]
    if len(tokenizer) > rows:
        raise InputError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the model embeds {rows}; they do not belong together"
        )


def _embedding_name(model: PreTrainedModel) -> str:
    embedding = model.get_input_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is embedding)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
