"""Adapter directories on disk: one format a file, read from safetensors and written atomically."""
