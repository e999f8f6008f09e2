"""Megatron on a machine without a GPU, where that is asked for."""
