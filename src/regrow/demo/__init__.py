"""A small corpus and a small model that ship with the package, for trying everything offline."""
