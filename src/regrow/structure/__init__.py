"""What hangs together in a model: tracing, groups, gates, adapters and the cut (floor 1)."""
