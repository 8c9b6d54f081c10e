"""From a tolerance or a size to ranks: curves of size against error, and choices on them."""
