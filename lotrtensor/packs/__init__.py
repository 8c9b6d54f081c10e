"""Packs: collections of adapters that share bases, on disk."""
