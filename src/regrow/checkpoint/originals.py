"""The weights that a quantised model was rounded from, brought to it from the checkpoint's files.

They come as those of an offloaded model do (`structure.offload`), one layer's at a time: what is kept in 4 bits can so
be asked, or trained to its end, with its true weights, and is never held in them.

Not covered: a model that has been cut. Linears are replaced whole, and cut afterwards as any others.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from regrow.checkpoint.load import weights_folder
from regrow.checkpoint.source import Source, first_names
from regrow.settings import Training
from regrow.structure.gates import Gates
from regrow.structure.offload import InFile, Offloaded, come_and_go
from regrow.structure.quantised import quantised_linears, stand_in


class Originals:
    """The checkpoint that a quantised model was loaded from; its files must not change meanwhile."""

    def __init__(self, name: str) -> None:
        """Nothing is read yet.

        Args:
            name: of the model: a folder, or a repository on the hub.
        """
        self.name = name

    @classmethod
    def wanted(cls, name: str, training: Training) -> "Originals | None":
        """Those of a model, if its training ends on them."""
        return cls(name) if training.ends_on_originals else None

    def put(self, model: PreTrainedModel, gates: Gates) -> dict[str, nn.Module]:
        """Let plain linears whose weights lie in the files take the place of a whole model's quantised ones.

        Args:
            gates: of the model; they follow.

        Returns:
            The quantised linears by name.

        Raises:
            InputError: as `Source`.
        """
        source = Source(self.name, weights_folder(self.name))
        firsts, names = first_names(source.model), {id(module): name for name, module in model.named_modules()}
        replaced: dict[str, nn.Module] = {names[id(linear)]: linear for linear in quantised_linears(model)}
        for name, linear in replaced.items():
            stored = name.removesuffix(".base_layer")
            read = partial(source.read, firsts.get(f"{stored}.weight", f"{stored}.weight"))
            if isinstance(source.model.get_submodule(stored), Conv1D):  # quantised, it is a linear as any other
                read = partial(_turned, read)
            model.set_submodule(name, _linear(linear, InFile(read), model))
        come_and_go(model)
        gates.hook_anew()
        return replaced

    @contextmanager
    def borrowed(self, model: PreTrainedModel, gates: Gates) -> Iterator[None]:
        """Within this context a whole quantised model computes with the weights it was rounded from."""
        replaced = self.put(model, gates)
        try:
            yield
        finally:
            for name, linear in replaced.items():
                model.set_submodule(name, linear)
            gates.hook_anew()


def _linear(quantised: Any, store: InFile, model: PreTrainedModel) -> nn.Linear:
    """A plain linear with the bias of a quantised one, and its weight in a file."""
    made = stand_in(quantised, model.dtype)
    made.weight = Offloaded.of(store, made.weight.shape, model.dtype, quantised.weight.device)
    made.bias = quantised.bias
    return made


def _turned(read: Callable[[], Tensor]) -> Tensor:
    return read().T
