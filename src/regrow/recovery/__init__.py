"""LoRA training, and the scoring and cutting that happen along with it (floor 3)."""
