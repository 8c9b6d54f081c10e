"""From a tolerance or a budget to ranks: curves of size against error, and choices on them."""
