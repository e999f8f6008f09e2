"""The commands of ``python -m megatron_rltd``, each with its own modules."""
