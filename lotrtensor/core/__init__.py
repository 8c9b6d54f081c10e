"""The mathematics: Tucker-2 decompositions of stacks of matrices, on arrays of any library.

Nothing here knows of files, layers or adapters.
"""
