"""random-LTD in Megatron's own training loop."""
