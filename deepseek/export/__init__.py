"""Models in other formats: Hugging Face, ONNX, OpenVINO, TensorRT, 8-bit checkpoints."""
