"""Make Megatron's data sets from text."""
