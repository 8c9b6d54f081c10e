"""Choose ranks for a tolerance or a size, on curves of size against error."""
