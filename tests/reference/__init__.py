"""Naive twins: each published method once more, slow and plain, to hold the package against."""
