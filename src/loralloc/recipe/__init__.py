"""From a recipe to a run: its objects, its stages, its folder, what comes out of it."""
