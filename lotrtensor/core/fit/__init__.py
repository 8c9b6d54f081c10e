"""A Tucker-2 decomposition of a stack: goal, small problem, algorithms, bounds and errors."""
