"""Text in, windows of tokens out (floor 0)."""
