"""``convert-deepspeed``: a DeepSpeed configuration as our flags."""
