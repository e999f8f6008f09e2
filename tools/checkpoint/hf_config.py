"""What Megatron's arguments and a Hugging Face configuration say of the same GPT.

`hf_bert` and `hf_vit` say it of these. Either way, what the other side does not have is refused,
all at once and by name.
"""

import copy
from typing import Any

from hf_names import FAMILIES
from hf_weights import ConversionError, Shape

from megatron_rltd.config import to_flag
from megatron_rltd.groups import split_pattern
from megatron_rltd.patching.versions import package_version

# What no Hugging Face model of our families has. These arguments must be as here, or unset.
NEUTRAL: dict[str, Any] = {
    "num_experts": None,
    "multi_latent_attention": False,
    "mtp_num_layers": None,
    "hybrid_layer_pattern": None,
    "heterogeneous_layers_config_path": None,
    "heterogeneous_layers_config_encoded_json": None,
    "experimental_attention_variant": None,
    "spec": None,
    "squared_relu": False,
    "quick_geglu": False,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "qk_layernorm": False,
    "qk_l2_norm": False,
    "window_size": None,
    "softmax_type": "vanilla",
    "attention_output_gate": False,
    "apply_residual_connection_post_layernorm": False,
    "use_mup": False,
    "no_rope_freq": None,
}
# What a family is made of. The first names the family.
POSITIONS = {"gpt2": "learned_absolute", "llama": "rope"}
REQUIRED: dict[str, dict[str, Any]] = {
    "gpt2": {
        "normalization": "LayerNorm",
        "swiglu": False,
        "add_bias_linear": True,
        "group_query_attention": False,
    },
    "llama": {
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": False,
        "rotary_seq_len_interpolation_factor": None,
    },
}
# Flags that are not spelled like the argument that they set.
_FLAGS = {"add_bias_linear": "--disable-bias-linear"}
# Both compute x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3))).
TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh")
EXACT_GELUS = ("gelu", "gelu_python")


def require_transformers() -> None:
    """Refuse a transformers whose configurations are spelled otherwise (dtype, rope_parameters).

    Raises:
        ConversionError: There is none, or one before 5.
    """
    found = package_version("transformers")
    if found is None or int(found.partition(".")[0]) < 5:
        there = "no transformers is installed" if found is None else f"transformers {found} is old"
        raise ConversionError(f"{there}: pip install 'transformers>=5'")


def as_gpt(args: Any) -> Any:
    """Return the arguments of the GPTModel that computes what a HybridModel of `*-` layers does.

    Those of any other model are returned as they are.
    """
    pattern = getattr(args, "hybrid_layer_pattern", None)
    if not pattern or "/" in pattern or set(split_pattern(pattern)) != {"*-"}:
        return args
    same = copy.copy(args)
    same.num_layers = len(split_pattern(pattern))
    # Every HybridModel has a --spec; whether it is this one shows in the parameters' names.
    same.hybrid_layer_pattern = same.spec = None
    return same


def family_of(args: Any) -> str:
    """Return "gpt2" or "llama" for Megatron's arguments.

    Raises:
        ConversionError: The model has something that neither has.
    """
    problems = without_counterpart(args, "GPT-2 and Llama")
    position = args.position_embedding_type
    family = next((f for f, p in POSITIONS.items() if p == position), None)
    if family is None:
        problems.append(f"--position-embedding-type {position} is neither GPT-2's nor Llama's")
    else:
        title, given = FAMILIES[family].title, f" with --position-embedding-type {position}"
        problems += differing(args, REQUIRED[family], title, given)
    if family == "gpt2" and (
        args.hidden_size % args.kv_channels
        or args.kv_channels * args.num_attention_heads > args.hidden_size
    ):
        problems.append(
            f"--kv-channels {args.kv_channels} with --num-attention-heads "
            f"{args.num_attention_heads}: GPT-2's heads are together as wide as --hidden-size, and "
            "only fewer of these can be filled up with zeros"
        )
    if problems or family is None:
        raise ConversionError("this model cannot be exported: " + "; ".join(problems))
    return family


def without_counterpart(args: Any, title: str, but: tuple[str, ...] = ()) -> list[str]:
    """Return what to say of the arguments that no Hugging Face model of some families has.

    Args:
        title: The families.
        but: Names of `NEUTRAL` to pass over.
    """
    return [
        f"{_given(args, name)} has no counterpart in Hugging Face's {title}"
        for name, neutral in NEUTRAL.items()
        if name not in but and getattr(args, name, neutral) not in (neutral, None)
    ]


def differing(args: Any, required: dict[str, Any], title: str, given: str = "") -> list[str]:
    """Return what to say of the arguments that a family has otherwise.

    Args:
        required: {name: the family's value}.
        title: The family.
        given: What makes the model one of the family, if the command line says it.
    """
    return [
        f"{_given(args, name)}{given}: Hugging Face's {title} has {_of_family(name, value)}"
        for name, value in required.items()
        if _differs(getattr(args, name, value), value)
    ]


def wrong_settings(config: Any, wanted: dict[str, tuple]) -> list[str]:
    """Return what to say of a Hugging Face configuration's values that Megatron does not have.

    Args:
        wanted: {name: the values that can be}; a missing one counts as the first.
    """
    return [
        f"{name} {getattr(config, name)} (can be {' or '.join(map(str, values))})"
        for name, values in wanted.items()
        if getattr(config, name, values[0]) not in values
    ]


def _differs(value: Any, wanted: Any) -> bool:
    return bool(value) != wanted if isinstance(wanted, bool) else value not in (wanted, None)


def _given(args: Any, name: str) -> str:
    """Return what was on the command line, or what would have been."""
    value = getattr(args, name)
    flag = _FLAGS.get(name, to_flag(name))
    if name == "add_bias_linear":
        return f"no {flag}" if value else flag
    return flag if value is True else f"no {flag}" if value is False else f"{flag} {value}"


def _of_family(name: str, value: Any) -> str:
    if name in _FLAGS:
        return "biases" if value else "none"
    return "none" if not value else "it" if value is True else str(value)


def shape_of(args: Any, vocabulary: int) -> Shape:
    """Return the layout of a model's parameters.

    Args:
        args: Megatron's arguments.
        vocabulary: Tokens, without padding.
    """
    grouped = args.group_query_attention
    return Shape(
        layers=args.num_layers,
        heads=args.num_attention_heads,
        groups=args.num_query_groups if grouped else args.num_attention_heads,
        vocabulary=vocabulary,
        tied=not args.untie_embeddings_and_output_weights,
        centred_norms=args.layernorm_zero_centered_gamma,
        all_heads=args.hidden_size // args.kv_channels,
    )


def activation_of(args: Any) -> str:
    """Return Hugging Face's name for the GELU that Megatron computes.

    Megatron's ``F.gelu`` is exact, its fusion with the bias the tanh approximation
    (``megatron/core/transformer/mlp.py:MLP.forward``), and so is Transformer Engine's.
    """
    tanh = ("bias_gelu_fusion", "use_te_activation_func", "use_transformer_engine_op_fuser")
    return "gelu_new" if any(getattr(args, name, False) for name in tanh) else "gelu"


def config_of(family: str, args: Any, vocabulary: int, ends: dict[str, int | None]) -> Any:
    """Return the configuration of the Hugging Face model.

    Args:
        vocabulary: Tokens, without padding.
        ends: bos_token_id and eos_token_id.
    """
    from transformers import GPT2Config, LlamaConfig

    if family == "gpt2":
        return GPT2Config(
            vocab_size=vocabulary,
            n_positions=args.max_position_embeddings,
            n_embd=args.hidden_size,
            n_layer=args.num_layers,
            n_head=args.hidden_size // args.kv_channels,
            n_inner=args.ffn_hidden_size,
            tie_word_embeddings=not args.untie_embeddings_and_output_weights,
            activation_function=activation_of(args),
            layer_norm_epsilon=args.layernorm_epsilon,
            embd_pdrop=args.hidden_dropout,
            resid_pdrop=args.hidden_dropout,
            attn_pdrop=args.attention_dropout,
            **ends,
        )
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=args.hidden_size,
        intermediate_size=args.ffn_hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        num_key_value_heads=shape_of(args, vocabulary).groups,
        head_dim=args.kv_channels,
        max_position_embeddings=args.max_position_embeddings,
        rms_norm_eps=args.layernorm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": float(args.rotary_base)},
        attention_dropout=args.attention_dropout,
        tie_word_embeddings=not args.untie_embeddings_and_output_weights,
        **ends,
    )


def shape_of_config(config: Any) -> Shape:
    """Return the layout of the parameters of a Hugging Face model."""
    groups = getattr(config, "num_key_value_heads", config.num_attention_heads)
    return Shape(
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        groups=groups,
        vocabulary=config.vocab_size,
        tied=config.tie_word_embeddings,
    )


def check_config(config: Any) -> str:
    """Return the family of a Hugging Face model that Megatron can hold.

    Raises:
        ConversionError: Megatron's GPT, as `pretrain_gpt` builds it, would compute something else.
    """
    wanted: dict[str, tuple]
    if config.model_type == "gpt2":
        wanted = {
            "activation_function": (*TANH_GELUS, *EXACT_GELUS),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        }
    else:
        wanted = {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)}
    problems = wrong_settings(config, wanted)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        problems.append(f"rope_type {rope['rope_type']} (can be default)")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"partial_rotary_factor {rope['partial_rotary_factor']} (can be 1)")
    if rope.get("rope_theta", 1) % 1:
        problems.append(f"rope_theta {rope['rope_theta']} (--rotary-base takes whole numbers)")
    if problems:
        raise ConversionError("this model cannot be imported: " + "; ".join(problems))
    return config.model_type


def flags_of(config: Any) -> list[str]:
    """Return Megatron's flags for the model of a Hugging Face configuration."""
    flags: dict[str, Any] = {
        "--num-layers": config.num_hidden_layers,
        "--hidden-size": config.hidden_size,
        "--num-attention-heads": config.num_attention_heads,
        "--max-position-embeddings": config.max_position_embeddings,
    }
    bare = []
    if config.model_type == "gpt2":
        flags |= {
            "--ffn-hidden-size": config.n_inner or 4 * config.hidden_size,
            "--norm-epsilon": config.layer_norm_epsilon,
            "--attention-dropout": config.attn_pdrop,
            "--hidden-dropout": config.resid_pdrop,
        }
        if config.activation_function in EXACT_GELUS:
            bare.append("--no-bias-gelu-fusion")
    else:
        head = getattr(config, "head_dim", None)
        flags |= {
            "--ffn-hidden-size": config.intermediate_size,
            "--kv-channels": head or config.hidden_size // config.num_attention_heads,
            "--norm-epsilon": config.rms_norm_eps,
            "--attention-dropout": config.attention_dropout,
            "--hidden-dropout": 0.0,
            "--position-embedding-type": "rope",
            "--rotary-base": int(config.rope_parameters["rope_theta"]),
            "--normalization": "RMSNorm",
        }
        bare += ["--swiglu", "--disable-bias-linear"]
        if config.num_key_value_heads != config.num_attention_heads:
            flags["--num-query-groups"] = config.num_key_value_heads
            bare.append("--group-query-attention")
    if not config.tie_word_embeddings:
        bare.append("--untie-embeddings-and-output-weights")
    return [*(str(part) for pair in flags.items() for part in pair), *bare]
