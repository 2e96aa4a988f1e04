"""Results for people: reports (page, Markdown, terminal), pictures, the checkpoint's model card (floor 3)."""
