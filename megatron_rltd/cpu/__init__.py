"""Megatron on a machine without a GPU, if you ask for it."""
