"""A GPT training script for people who have only the megatron-core wheel."""
