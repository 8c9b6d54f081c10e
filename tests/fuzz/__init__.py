"""Fuzzing of everything that reads files: valid adapters, changed; a result or a `LotrError`."""
