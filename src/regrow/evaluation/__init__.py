"""What a model is worth and what it costs: perplexity, size, speed, memory, sample text (floor 3)."""
