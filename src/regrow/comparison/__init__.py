"""Many runs on one model, text, number of tokens and evaluation: a grid, and what to learn from it."""
