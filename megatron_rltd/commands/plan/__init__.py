"""``plan``: what a training will cost and save, before any GPU is rented."""
