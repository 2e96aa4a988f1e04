"""A teacher on disk: what the whole model finds most likely at every position of the training text.

The folder holds, for N windows of T tokens, `windows.npy` (int64, `[N]`, ascending), which of the text's windows they
are, `tokens.npy` (int32) and `log_probs.npy` (float32), both `[N, T - 1, K]`, most likely first, and `log_tails.npy`
(float32, `[N, T - 1]`), the log of all other tokens' probability together. That is 8 K + 4 bytes a position: 10 GB for
20 million tokens at K = 64. Read through memory maps.

Shapes: N windows, B of them at a time, T tokens, V vocabulary, K tokens kept, P positions taken at once.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from regrow.checkpoint.files import new_folder
from regrow.data.tokens import Batch, Windows
from regrow.processes import ALONE, Processes
from regrow.recovery.losses import TopTarget, position_chunks
from regrow.recovery.teacher import Lesson

DTYPES = {"tokens": "<i4", "log_probs": "<f4", "log_tails": "<f4"}


def cache_bytes(windows: int, length: int, top_k: int) -> int:
    """What the answers to so many windows take on disk, headers apart."""
    return windows * (8 + (length - 1) * (8 * top_k + 4))


class CachedTeacher:
    """Answers for windows of the text that it was written for, by their numbers, at one temperature."""

    kind = "cached"

    def __init__(self, folder: Path, is_owner: bool = True) -> None:
        """Read what has been written.

        Args:
            is_owner: whether the folder goes when this teacher does.
        """
        self.folder = folder
        self.is_owner = is_owner
        self.numbers_N = np.load(_file(folder, "windows"))
        self.bytes = sum(file.stat().st_size for file in folder.iterdir())
        """On disk. The owner may be done, and the folder gone, before the others ask."""

    def lesson(self, batch: Batch) -> Lesson:
        """See `Teacher`."""
        assert batch.numbers_B is not None, "a cached teacher knows windows by their numbers"
        wanted_B = batch.numbers_B.numpy()
        rows = np.searchsorted(self.numbers_N, wanted_B)
        assert np.array_equal(self.numbers_N.take(rows, mode="clip"), wanted_B), "a window that was not written down"
        device = batch.ids_BT.device
        # Mapped for as long as it takes: pages that stay mapped count as this process' memory.
        read = (np.load(_file(self.folder, name), mmap_mode="r")[rows] for name in DTYPES)
        tokens, log_probs, log_tails = (torch.from_numpy(values).to(device) for values in read)
        return Lesson(TopTarget(tokens.long(), log_probs, log_tails), [])

    def before_change(self) -> None:
        """It needs no model."""

    def close(self) -> None:
        """Give the disk back."""
        if self.is_owner:
            shutil.rmtree(self.folder)


def write_cache(
    folder: Path,
    logits: Callable[[Tensor], Tensor],
    windows: Windows,
    numbers_N: Tensor,
    *,
    batch_size: int,
    top_k: int,
    temperature: float,
    on_batch: Callable[[int], None],
    processes: Processes = ALONE,
) -> None:
    """Write down a teacher's answers; the folder appears whole or not at all.

    Args:
        logits: of the teacher: ids `[B, T]` -> `[B, T, V]`.
        numbers_N: of the windows that it will be asked about, ascending.
        top_k: K; all of V if that is fewer.
        on_batch: called with the number of windows just written.
        processes: those that share the windows; the main one writes.
    """
    answers = _answers(logits, windows.ids_NT[numbers_N], batch_size, top_k, temperature, processes)
    if not processes.is_main:
        for _ in answers:
            pass
        return
    with new_folder(folder) as temporary, ExitStack() as stack:
        np.save(_file(temporary, "windows"), numbers_N.numpy())
        # Plain writes: a full disk is an error then, not a crash as in a memory map.
        files = {name: stack.enter_context(open(_file(temporary, name), "wb")) for name in DTYPES}
        for number, answer in enumerate(answers):
            for (name, dtype), tensor in zip(DTYPES.items(), answer, strict=True):
                if number == 0:
                    shape = (len(numbers_N), *tensor.shape[1:])
                    npy.write_array_header_1_0(files[name], {"descr": dtype, "fortran_order": False, "shape": shape})
                files[name].write(tensor.cpu().numpy().astype(dtype).tobytes())
            on_batch(len(answer[0]))


def top_distribution(logits_BTV: Tensor, top_k: int, temperature: float) -> TopTarget:
    """The K most likely tokens at positions 1 to T - 1, and the log of the remaining probability, in float32."""
    top_k = min(top_k, logits_BTV.shape[-1])
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for positions in position_chunks(logits_BTV):
        log_p = (logits_BTV[:, positions].float() / temperature).log_softmax(-1)
        log_probs, tokens = log_p.topk(top_k)
        parts.append((tokens, log_probs, log_p.scatter_(-1, tokens, -torch.inf).logsumexp(-1)))
    tokens, log_probs, log_tails = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return TopTarget(tokens, log_probs, log_tails)


def _answers(
    logits: Callable[[Tensor], Tensor],
    ids_NT: Tensor,
    batch_size: int,
    top_k: int,
    temperature: float,
    processes: Processes,
) -> Iterator[list[Tensor]]:
    """Batch by batch, in the order of `DTYPES`; in all but the main process empty lists."""
    for ids_BT in torch.split(ids_NT, batch_size):
        own: dict[str, Tensor] = {}
        with processes.uneven():
            if len(part_BT := ids_BT[processes.rows(len(ids_BT))]):
                target = top_distribution(logits(part_BT), top_k, temperature)
                own = dict(zip(DTYPES, (target.tokens_BTK, target.log_probs_BTK, target.log_tail_BT), strict=True))
        found = [answer for answer in processes.gather(own) if answer]
        yield [torch.cat([answer[name] for answer in found]) for name in DTYPES if found]


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"
