"""Export of models: Hugging Face, ONNX, OpenVINO, TensorRT, and 8-bit checkpoints."""
