"""The command line ``lotr``: one file a command, parsing and printing only."""

from lotrtensor.cli.app import main

__all__ = ["main"]
