"""Model folders: resolve names, convert, fingerprint, and write atomically."""
