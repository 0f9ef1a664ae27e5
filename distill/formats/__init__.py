"""Files that other programs read: safetensors, RADIO's, ONNX, and the model card."""
