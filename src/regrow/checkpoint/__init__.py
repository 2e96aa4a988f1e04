"""Models in and out: loading, saving, and the proof that what was saved is what was meant (floor 3)."""
