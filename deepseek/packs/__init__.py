"""Expert packs: one safetensors file with its papers. Start with `pack.py`."""
