"""What the kernels of the site's pages are started with."""

c = get_config()  # noqa: F821 - IPython brings it
c.IPKernelApp.log_level = "ERROR"  # they run unencrypted on the loopback, and say so
