"""The Megatron features that the search for a ticket, or the draw, refuses to work with."""

from collections.abc import Callable
from typing import Any

from megatron_rltd.config import ConfigError
from megatron_rltd.early_bird.target import DRAW, TICKET
from megatron_rltd.early_bird.units import ModelShape
from megatron_rltd.refusals import Refusal


def _truthy(name: str) -> Callable[[Any], Any]:
    return lambda args: getattr(args, name, None)


_OTHER = "has weights that Early-Bird does not know"
_WITHOUT = "use a GPTModel without it"
OF_MODEL: tuple[Refusal, ...] = (
    Refusal(
        "--num-experts",
        lambda a: getattr(a, "num_experts", None) or getattr(a, "num_moe_experts", None),
        "makes a mixture of experts, whose FFNs are not pruned",
        "use a dense GPTModel",
    ),
    Refusal(
        "--multi-latent-attention",
        _truthy("multi_latent_attention"),
        "has no K/V heads that could be pruned",
        "use multi-head or grouped-query attention",
    ),
    Refusal(
        "--hybrid-layer-pattern",
        lambda a: getattr(a, "hybrid_layer_pattern", None) or getattr(a, "is_hybrid_model", None),
        "makes a HybridModel, whose layers are stored under other names",
        "use a GPTModel",
    ),
    Refusal("--mtp-num-layers", _truthy("mtp_num_layers"), _OTHER, _WITHOUT),
    Refusal(
        "--heterogeneous-layers-config-path",
        lambda a: (
            getattr(a, "heterogeneous_layers_config_path", None)
            or getattr(a, "heterogeneous_layers_config_encoded_json", None)
        ),
        "gives layers different sizes, but a ticket keeps the same number in every layer",
        _WITHOUT,
    ),
    Refusal("--attention-output-gate", _truthy("attention_output_gate"), _OTHER, _WITHOUT),
    Refusal(
        "--experimental-attention-variant",
        _truthy("experimental_attention_variant"),
        _OTHER,
        _WITHOUT,
    ),
    Refusal(
        "--softmax-type learnable",
        lambda a: getattr(a, "softmax_type", "vanilla") == "learnable",
        "has a number for each head that Early-Bird does not know",
        "use --softmax-type vanilla",
    ),
    Refusal(
        "--fp8-param-gather",
        lambda a: getattr(a, "fp8_param_gather", None) or getattr(a, "fp8_param", None),
        "keeps the weights in FP8 alone, whose magnitudes are not compared",
        "omit it; --fp8-format may stay",
    ),
    Refusal(
        "--fp4-param-gather",
        lambda a: getattr(a, "fp4_param_gather", None) or getattr(a, "fp4_param", None),
        "keeps the weights in FP4 alone, whose magnitudes are not compared",
        "omit it; --fp4-format may stay",
    ),
    Refusal(
        "--use-megatron-fsdp",
        _truthy("use_megatron_fsdp"),
        "splits each weight over ranks",
        "use --use-distributed-optimizer",
    ),
    Refusal(
        "--use-torch-fsdp2",
        _truthy("use_torch_fsdp2"),
        "splits each weight over ranks",
        "use --use-distributed-optimizer",
    ),
    Refusal(
        "--optimizer with layer-wise updates",
        lambda a: (
            getattr(a, "use_layer_wise_distributed_optimizer", None)
            or "muon" in str(getattr(a, "optimizer", "")).lower()
        ),
        "keeps states of whole matrices that cannot be cut",
        "use --optimizer adam",
    ),
)


def find_refused(args: Any) -> list[str]:
    """Return a sentence for every feature of a run in use that cannot be searched or drawn.

    Args:
        args: Megatron's validated arguments, or those that a checkpoint holds.
    """
    return [refusal.message for refusal in OF_MODEL if refusal.used(args)]


def find_refused_in_run(args: Any) -> list[str]:
    """Return the same for a search while training, whose layout and checkpoints matter, too."""
    found = find_refused(args)
    shape = ModelShape.of(args)
    if args.tensor_model_parallel_size > shape.num_query_groups:
        found.append(
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size} is more than the "
            f"{shape.num_query_groups} query groups, so that ranks share a K/V head: use at most "
            f"--tensor-model-parallel-size {shape.num_query_groups}"
        )
    if getattr(args, "gtp_weight_remat_size", 1) > 1:
        found.append("--tensor-parallel-num-weight-shards splits each weight over ranks: omit it")
    if not args.save:
        found.append(
            "--early-bird keeps its masks beside the checkpoints and saves one when the ticket has "
            "emerged: give --save"
        )
    if args.ckpt_format != "torch_dist":
        found.append(
            f"a ticket cannot be drawn from --ckpt-format {args.ckpt_format}: use --ckpt-format "
            "torch_dist"
        )
    if args.use_distributed_optimizer and (
        getattr(args, "non_persistent_ckpt_type", None) == "local"
    ):
        found.append(
            "--non-persistent-ckpt-type local cannot save the distributed optimizer in the form "
            "that a ticket is drawn from: use --non-persistent-ckpt-type global"
        )
    if args.no_save_optim:
        found.append("--no-save-optim would lose what the ticket continues with: omit it")
    return found


def refuse_other_sizes(checkpoint_args: Any, args: Any) -> None:
    """Refuse to load the checkpoint of a dense model as its ticket, or the other way round.

    Args:
        checkpoint_args: Those of the run or the draw that wrote it.
        args: Megatron's.

    Raises:
        ConfigError: It names the flags of sizes that differ.
    """
    names = ["num_attention_heads", "kv_channels", "ffn_hidden_size"]
    if all(getattr(a, "group_query_attention", False) for a in (args, checkpoint_args)):
        names.append("num_query_groups")
    differing, is_smaller = [], True
    for name in names:
        ours, theirs = getattr(args, name, None), getattr(checkpoint_args, name, None)
        if ours is not None and theirs is not None and ours != theirs:
            differing.append(f"--{name.replace('_', '-')} {ours} (checkpoint: {theirs})")
            # Without its flag, the size of a head follows from their number.
            is_smaller = is_smaller and (ours < theirs or name == "kv_channels")
    if not differing:
        return
    way_out = "give the sizes of the checkpoint"
    if getattr(checkpoint_args, TICKET, None):
        way_out = "it is a ticket: give the flags that draw_ticket.py printed"
    elif is_smaller:
        way_out = f"to continue with a ticket of it, draw one with {DRAW} and load that"
    raise ConfigError(
        [f"the checkpoint's model has other sizes than {', '.join(differing)}: {way_out}"]
    )
