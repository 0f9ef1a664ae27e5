"""Exports that other programs read: safetensors, RADIO, ONNX, transformers; cards; the hub."""
