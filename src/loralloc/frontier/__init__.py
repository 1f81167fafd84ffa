"""Quality over size, from one run: smaller adapters out of a trained one, and which of them is small enough."""
