"""Model folders: found by name, converted, fingerprinted and written whole or not at all."""
