"""What the checkpoint says that a run is about to load."""

from typing import Any


def args_to_load(args: Any) -> Any:
    """Return the arguments of the run whose distributed checkpoint will be loaded; None if unknown.

    Megatron itself looks at them after it has loaded all tensors, and with ``--finetune`` not at
    all. All ranks must call this.

    Args:
        args: Megatron's.
    """
    from megatron.core import dist_checkpointing
    from megatron.training import checkpointing

    folders = (getattr(args, name, None) for name in ("load", "pretrained_checkpoint"))
    load = next((f for f in folders if f and checkpointing.checkpoint_exists(f)), None)
    if load is None:
        return None
    tracker = checkpointing.get_checkpoint_tracker_filename(load)
    iteration, release = checkpointing.read_metadata(tracker)
    iteration = getattr(args, "ckpt_step", None) or iteration
    folder = checkpointing.get_checkpoint_name(load, iteration, release, return_base_dir=True)
    try:
        return dist_checkpointing.load_common_state_dict(folder).get("args")
    except Exception:  # Megatron says what is wrong when it loads it, or it has another format
        return None
