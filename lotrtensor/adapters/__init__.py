"""What an adapter's files hold, as named slices, and how slices are grouped. No maths."""
