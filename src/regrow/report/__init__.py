"""Results for people: a Markdown report and the checkpoint's model card (floor 3)."""
