"""Expert packs: one safetensors file with weights, gates and a manifest. Start with `pack.py`."""
