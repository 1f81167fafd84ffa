"""The methods: one file or folder per paper, with the same parts in the same order."""
