"""What a model is worth and what it costs: perplexity, zero-shot tasks, size, speed, memory, sample text (floor 3)."""
