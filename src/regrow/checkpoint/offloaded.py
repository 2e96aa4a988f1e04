"""Models whose frozen weights stay in the host's memory, in their files or in parts; see `structure.offload`.

The dtype is converted as a weight is brought, not in a copy of the file: a bfloat16 file is half as long to read as a
float32 one would be.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from regrow.checkpoint.load import compute_dtype, load_config, load_model, weights_folder
from regrow.checkpoint.source import Source, first_names
from regrow.processes import ALONE, Processes
from regrow.structure.offload import InFile, InMemory, InParts, Offloaded, Store, come_and_go
from regrow.structure.quantised import Quantization
from regrow.structure.trace import decoder_layers, used_elsewhere


def load(
    name: str,
    device: torch.device,
    *,
    offload: str = "none",
    quantization: Quantization | Literal["none"] = "none",
    trust_remote_code: bool = False,
    processes: Processes = ALONE,
) -> PreTrainedModel:
    """A model, its frozen weights kept as `training.offload` and `training.quantization` say.

    Raises:
        InputError: as `load_model` and `load_offloaded`.
    """
    if offload == "none":
        return load_model(name, device, trust_remote_code=trust_remote_code, quantization=quantization)
    assert quantization == "none"
    return load_offloaded(name, device, offload, trust_remote_code, processes)


def load_offloaded(
    name: str, device: torch.device, place: str, trust_remote_code: bool = False, processes: Processes = ALONE
) -> PreTrainedModel:
    """A model with the matrices of its decoder layers elsewhere; all else is on the device, as `load_model` has it.

    Args:
        place: cpu, the host's memory; disk, the checkpoint's own files, which must not change meanwhile; or shards,
            the devices of all processes, each of which loads the model at the same time.

    Raises:
        InputError: as `Source`, which says what files are not read tensor by tensor.
    """
    source = Source(name, weights_folder(name), trust_remote_code)
    config = load_config(name, trust_remote_code)
    dtype = compute_dtype(config, device)
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    inside = f"{decoder_layers(model)[0]}."
    here = used_elsewhere(model)  # those come with no pass of their owner
    outlines = {name: each for name, each in model.named_parameters() if each.ndim > 1 and name not in here}
    firsts = first_names(source.model)  # in the other model nothing is tied yet
    for first in dict.fromkeys(firsts.get(name, name) for name in model.state_dict()):
        read = partial(source.read, first)
        if first.startswith(inside) and first in outlines:
            store = _store(place, read, device, processes)
            owner, _, last = first.rpartition(".")
            parameter = Offloaded.of(store, outlines[first].shape, dtype, device)
            setattr(model.get_submodule(owner), last, parameter)
        else:
            kept = model.get_parameter_or_buffer(first).dtype
            set_module_tensor_to_device(model, first, device, value=read().to(kept, copy=True))
    model.tie_weights()
    model.generation_config = source.generation_config()
    come_and_go(model)
    return model.to(device).eval()  # type: ignore[no-any-return]


def _store(place: str, read: Callable[[], Tensor], device: torch.device, processes: Processes) -> Store:
    match place:
        case "disk":
            return InFile(read)
        case "cpu":
            return InMemory(read().clone())
        case _:
            return InParts(processes.hold(read().to(device)), processes.hold, InFile(read))
