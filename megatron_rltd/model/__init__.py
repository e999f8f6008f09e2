"""A model whose layers keep only some of the tokens. Knows of Megatron-core's model classes."""
