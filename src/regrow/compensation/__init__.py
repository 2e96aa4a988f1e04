"""What the units that stay can do for those that go: least squares on the inputs of a consumer (floor 1)."""
