"""What makes Megatron's data sets from text."""
