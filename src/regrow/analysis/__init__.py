"""Sensitivity analysis: prune one group at a time, see what it costs (floor 3)."""
