"""What one does to adapters: convert, truncate, extract, merge, compare; all are public at the top.

The modules are private, so that ``lotrtensor.convert`` is the function.
"""
