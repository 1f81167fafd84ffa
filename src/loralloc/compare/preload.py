"""What the fork server of a comparison imports, once for all runs."""

import logging

# On a CPU, bitsandbytes logs missing kernels when it is imported.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import loralloc.compare.cell  # noqa: E402, F401  # after the above, or it would be too late
