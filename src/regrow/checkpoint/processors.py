"""How images, sound and video are prepared for a model, by the files beside its weights."""

from pathlib import Path

from huggingface_hub import hf_hub_download
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME


def processor_files(model: str) -> dict[str, str]:
    """Those that a checkpoint has, by name; a model for text alone has none.

    Args:
        model: a folder, or a repository on the hub.
    """
    found = {}
    for name in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME):
        try:
            file = Path(model) / name if Path(model).is_dir() else Path(hf_hub_download(model, name))
            found[name] = file.read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue  # there is none, or no network, or it is no text
    return found
