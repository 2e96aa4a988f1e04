"""A finished checkpoint in other shapes and other programs' files: padded, GGUF, ONNX (floor 3)."""
