"""Training: the allocation as a Trainer callback and for own loops, and the trainer behind `loralloc train`."""
