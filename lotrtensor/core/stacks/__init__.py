"""What is decomposed: stacks of thin factors, of whole matrices, or of slices read on demand."""
