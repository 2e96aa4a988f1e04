"""Which units go, when, and how the choice is written down (floor 2)."""
