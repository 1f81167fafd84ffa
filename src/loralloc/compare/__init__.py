"""A comparison: methods × learning rates × budgets × seeds, fair by construction, and one page with a verdict."""
