"""Under which licence a checkpoint was given, by its own card."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.repocard import metadata_load

KEYS = ("license", "license_name", "license_link")


def licence_of(model: str) -> dict[str, str]:
    """What the card's metadata says of the licence, by the hub's own keys; empty if there is no card, or it is silent.

    Args:
        model: a folder, or a repository on the hub.
    """
    try:
        card = Path(model) / "README.md" if Path(model).is_dir() else Path(hf_hub_download(model, "README.md"))
        metadata: dict[str, Any] = metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):  # no card, no network, or a card that is not as the hub wants it
        return {}
    known = {key: metadata[key] for key in KEYS if isinstance(metadata.get(key), str)}
    if not known.get("license_link", "https://").startswith("https://"):
        del known["license_link"]  # relative to a folder that the result is not in
    return known
