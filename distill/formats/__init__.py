"""Exports in formats that other programs read: safetensors, RADIO and ONNX; and model cards."""
