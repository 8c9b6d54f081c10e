"""Faults of the system, injected into whole commands by strace; see `__main__`."""
