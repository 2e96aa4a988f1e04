"""Criteria: what a unit is worth. Evidence in, one score per unit out; the lowest go first (floor 1)."""
