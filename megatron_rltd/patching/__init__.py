"""Replacing attributes of modules, and the Megatron versions that this was tested with."""
