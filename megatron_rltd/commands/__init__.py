"""What follows ``python -m megatron_rltd``; each command with its library beside it."""
