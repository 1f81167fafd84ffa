"""Quality over size, from one run: a trained adapter is cut to smaller sizes, and one of them is recommended."""
