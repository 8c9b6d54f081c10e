"""Stacks in bits: columns rounded to grids or codebooks, and the bytes that hold them."""
