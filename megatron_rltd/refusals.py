"""The Megatron features that random-LTD refuses to run with, and the check of a whole command line.

With each of them, Megatron would train on wrong numbers, or drop nothing while the logs claim that
it does. So each is an error at start-up that names the flag and the way out.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from megatron_rltd.config import FIELDS, FLAG_PREFIX, ConfigError, RandomLTDConfig


@dataclass(frozen=True)
class Refusal:
    """A Megatron feature that cannot run with dropped tokens.

    Attributes:
        flag: As the user gave it.
        used: Whether Megatron's arguments use it.
        why: What would go wrong.
        way_out: What to do instead.
    """

    flag: str
    used: Callable[[Any], Any] = field(repr=False)
    why: str
    way_out: str = "train without it, or without --random-ltd"

    @property
    def message(self) -> str:
        """What the user is told."""
        return f"{self.flag} {self.why}: {self.way_out}"


def _truthy(name: str) -> Callable[[Any], Any]:
    return lambda args: getattr(args, name, None)


def packs_sequences(args: Any) -> Any:
    """Return whether micro-batches hold packed sequences."""
    return getattr(args, "sft", None) or getattr(args, "dataloader_inter_document_masking", None)


def _is_hybrid(args: Any) -> Any:
    return getattr(args, "hybrid_layer_pattern", None) or getattr(args, "is_hybrid_model", None)


def _grows(args: Any) -> bool:
    return getattr(args, "random_ltd_grow_micro_batch", 1) > 1


def _has_auxiliary_loss(args: Any) -> bool:
    coefficients = getattr(args, "moe_aux_loss_coeff", None) or 0.0
    return any(coefficients if isinstance(coefficients, list) else [coefficients])


_BYPASS = "runs layers without their forward, so no token would be dropped"
_GROW = "--random-ltd-grow-micro-batch"
_OVER_A_PASS = "over all the micro-batches of a pass, not over each"
_OMIT = f"omit {_GROW}"
_STATIC = "sizes its buffers once, but the kept length changes"
REFUSALS: tuple[Refusal, ...] = (
    Refusal("--yaml-cfg", _truthy("yaml_cfg"), "replaces the parsed flags", "use flags"),
    Refusal(  # until Megatron 0.17
        "--use-legacy-models",
        _truthy("use_legacy_models"),
        "trains a model that is not Megatron-core's",
    ),
    Refusal(
        "--overlap-moe-expert-parallel-comm", _truthy("overlap_moe_expert_parallel_comm"), _BYPASS
    ),
    Refusal(
        "--cuda-graph-impl",
        lambda args: getattr(args, "cuda_graph_impl", None) not in (None, "none"),
        "replays layers with the shapes and the kept tokens of the capture",
        "use --cuda-graph-impl none",
    ),
    Refusal(
        "--perform-rl-step", _truthy("perform_rl_step"), "trains on rollouts, not on a data set"
    ),
    Refusal("--tp-comm-overlap", _truthy("tp_comm_overlap"), _STATIC),
    Refusal(
        "--multi-latent-attention with fused rotary embeddings",
        lambda args: (
            getattr(args, "multi_latent_attention", None)
            and getattr(args, "apply_rope_fusion", None)
        ),
        "takes one set of positions for all samples",
        "add --no-rope-fusion",
    ),
    Refusal(
        "--experimental-attention-variant",
        # In a HybridModel it is for the layers of the symbol D alone, which never drop.
        lambda args: (
            getattr(args, "experimental_attention_variant", None)
            and not (_is_hybrid(args) and args.experimental_attention_variant == "dsa")
        ),
        "shares positions or states between layers that would see different tokens",
    ),
    Refusal(
        "--random-ltd-recurrent-layers with packed sequences",
        lambda args: getattr(args, "random_ltd_recurrent_layers", None) and packs_sequences(args),
        "needs the boundaries of documents in a form that random-LTD does not make",
        "omit --random-ltd-recurrent-layers",
    ),
    Refusal(
        "--hybrid-context-parallel", _truthy("hybrid_context_parallel"), "splits samples unevenly"
    ),
    Refusal(
        "--moe-flex-dispatcher-backend hybridep",
        lambda args: (
            getattr(args, "moe_token_dispatcher_type", None) == "flex"
            and getattr(args, "moe_flex_dispatcher_backend", None) == "hybridep"
        ),
        _STATIC,
        "use --moe-token-dispatcher-type alltoall",
    ),
    Refusal("--moe-paged-stash", _truthy("moe_paged_stash"), _STATIC),
    Refusal(
        "--moe-expert-rank-capacity-factor", _truthy("moe_expert_rank_capacity_factor"), _STATIC
    ),
    Refusal(
        "--calculate-per-token-loss with --num-experts",
        lambda args: (
            getattr(args, "calculate_per_token_loss", None)
            and (getattr(args, "num_experts", None) or getattr(args, "num_moe_experts", None))
        ),
        "would divide the auxiliary losses of dropped layers by tokens they did not see",
    ),
    Refusal("--window-size", _truthy("window_size"), "counts kept tokens, not positions"),
    Refusal(
        "--fine-grained-activation-offloading",
        _truthy("fine_grained_activation_offloading"),
        _STATIC,
    ),
    Refusal(
        "--cpu-offloading-num-layers",
        lambda args: (
            getattr(args, "cpu_offloading", None)
            or getattr(args, "cpu_offloading_num_layers", None)
        ),
        "works on the hidden states between layers, but dropped layers do not pass them on",
        "use --recompute-granularity full",
    ),
    Refusal("--use-megatron-fsdp", _truthy("use_megatron_fsdp"), "is not tested with random-LTD"),
    Refusal("--use-torch-fsdp2", _truthy("use_torch_fsdp2"), "is not tested with random-LTD"),
    Refusal(
        "--tensor-parallel-num-weight-shards",
        lambda args: getattr(args, "gtp_weight_remat_size", 1) > 1,
        "gives the ranks of a data-parallel replica different samples",
    ),
    Refusal(
        "--sft and --dataloader-inter-document-masking with --context-parallel-size",
        lambda args: packs_sequences(args) and getattr(args, "context_parallel_size", 1) > 1,
        "splits every document between ranks, and each rank keeps a different number of tokens",
        "use --context-parallel-size 1",
    ),
    Refusal(
        "--sft and --dataloader-inter-document-masking with fused RoPE",
        lambda args: (
            packs_sequences(args)
            and getattr(args, "apply_rope_fusion", None)
            and getattr(args, "position_embedding_type", None) == "rope"
        ),
        "numbers the tokens of a document inside the kernel",
        "add --no-rope-fusion",
    ),
    Refusal(
        "--random-ltd-preflight with FP8",
        lambda args: (
            getattr(args, "random_ltd_preflight", None)
            and getattr(args, "fp8", None)
            and (
                getattr(args, "fp8_recipe", None) == "delayed"
                or getattr(args, "reuse_grad_buf_for_mxfp8_param_ag", None)
            )
        ),
        "would leave its maxima in FP8's delayed scaling, or clear a parameter buffer shared with "
        "gradients",
        "train without the preflight, or try it once with --exit-interval 2 and no --save",
    ),
    Refusal(
        "fused_single_qkv_rope of the TransformerConfig",
        _truthy("fused_single_qkv_rope"),
        "takes one set of positions for all samples",
        "set it to False",
    ),
    Refusal(
        f"{_GROW} with --mtp-num-layers",
        lambda args: _grows(args) and getattr(args, "mtp_num_layers", None),
        f"would average the loss {_OVER_A_PASS}",
        _OMIT,
    ),
    Refusal(
        f"{_GROW} with --moe-router-load-balancing-type sinkhorn",
        lambda args: (
            _grows(args) and "sinkhorn" in str(getattr(args, "moe_router_load_balancing_type", ""))
        ),
        f"would assign experts {_OVER_A_PASS}",
        _OMIT,
    ),
    Refusal(
        f"{_GROW} with --moe-expert-capacity-factor",
        lambda args: _grows(args) and getattr(args, "moe_expert_capacity_factor", None) is not None,
        f"would apply the capacity of an expert {_OVER_A_PASS}",
        _OMIT,
    ),
    Refusal(
        f"{_GROW} with packed sequences and --moe-aux-loss-coeff",
        lambda args: _grows(args) and packs_sequences(args) and _has_auxiliary_loss(args),
        f"would balance experts {_OVER_A_PASS}",
        _OMIT,
    ),
    Refusal(
        f"{_GROW} with --log-straggler",
        lambda args: _grows(args) and getattr(args, "log_straggler", None),
        "would time the model when the script calls it, before the model runs",
        _OMIT,
    ),
    Refusal(
        f"{_GROW} with distillation",
        lambda args: (
            _grows(args)
            and (getattr(args, "modelopt_enabled", None) or getattr(args, "logits_load_dir", None))
        ),
        "would lose the part of the loss that comes from inside the model",
        _OMIT,
    ),
)


# Not a row of the table: the flags alone do not say which model a script builds.
BERT_WITH_CONTEXT_PARALLELISM = (
    "--context-parallel-size with BERT: Megatron's BertModel does not split its samples between "
    "ranks: use --context-parallel-size 1, or --tensor-model-parallel-size with "
    "--sequence-parallel for long ones"
)


def find_refused(args: Any) -> list[str]:
    """Return a sentence for every Megatron feature in use that random-LTD refuses.

    Args:
        args: Megatron's arguments, or an object with the same attributes.
    """
    return [refusal.message for refusal in REFUSALS if refusal.used(args)]


def find_refused_in_model(transformer_config: Any, config: RandomLTDConfig) -> list[str]:
    """Return the same for a model that is already built."""
    ours = {FLAG_PREFIX + name: getattr(config, name) for name in FIELDS}
    return find_refused(SimpleNamespace(**vars(transformer_config), **ours))


def refuse_command_line(argv: list[str]) -> None:
    """Refuse flags that keep Megatron from validating its arguments.

    Everything else is checked after that validation.

    Raises:
        ConfigError: It names the flag.
    """
    if any(argument.partition("=")[0] == "--yaml-cfg" for argument in argv):
        refusal = next(refusal for refusal in REFUSALS if refusal.flag == "--yaml-cfg")
        raise ConfigError([refusal.message])
