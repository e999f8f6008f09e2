"""What Megatron's arguments and transformers' configuration say of the same MegatronBert.

Both have their norms before attention and MLP. BERT as Google published it has them behind.
"""

from collections.abc import Callable, Iterable
from typing import Any

from hf_config import (
    EXACT_GELUS,
    TANH_GELUS,
    activation_of,
    differing,
    without_counterpart,
    wrong_settings,
)
from hf_names import TOKEN_TYPES
from hf_weights import ConversionError, Shape
from torch import Tensor

MODEL_TYPE = "megatron-bert"
# BERT and what followed it, with each norm behind what MegatronBert has it before.
POST_NORM = (
    "bert roberta xlm-roberta camembert distilbert electra ernie mpnet xlm flaubert deberta "
    "deberta-v2 albert"
).split()
REQUIRED: dict[str, Any] = {
    "normalization": "LayerNorm",
    "swiglu": False,
    "add_bias_linear": True,
    "group_query_attention": False,
}
SPECS = (None, ["local"])  # of --spec, as pretrain_bert.py reads it
_PREDICTIONS, _SENTENCE_ORDER = "cls.predictions.", "cls.seq_relationship.weight"


def check_args(args: Any) -> None:
    """Check that transformers' MegatronBert computes what a BertModel of Megatron's does.

    Raises:
        ConversionError: It does not.
    """
    problems = without_counterpart(args, "MegatronBert", but=("spec",))
    if getattr(args, "spec", None) not in SPECS:
        problems.append(f"--spec {' '.join(args.spec)} has no counterpart in MegatronBert")
    problems += differing(args, REQUIRED, "MegatronBert")
    if args.kv_channels * args.num_attention_heads != args.hidden_size:
        problems.append(
            f"--kv-channels {args.kv_channels}: MegatronBert's heads are --hidden-size / "
            "--num-attention-heads wide"
        )
    if problems:
        raise ConversionError("this model cannot be exported: " + "; ".join(problems))


def config_of(args: Any, vocabulary: int, padding: int | None) -> Any:
    """Return the configuration of the Hugging Face model.

    MegatronBert has one activation for layers and language-model head. Megatron's head always
    computes the exact GELU, its layers the tanh approximation where it is fused with the bias. The
    layers decide: all fine-tuned models use them, none the head.

    Args:
        vocabulary: Tokens, without padding.
        padding: pad_token_id, if the tokenizer has one.
    """
    from transformers import MegatronBertConfig

    return MegatronBertConfig(
        vocab_size=vocabulary,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        intermediate_size=args.ffn_hidden_size,
        hidden_act="gelu" if activation_of(args) == "gelu" else "gelu_pytorch_tanh",
        hidden_dropout_prob=args.hidden_dropout,
        attention_probs_dropout_prob=args.attention_dropout,
        max_position_embeddings=args.max_position_embeddings,
        type_vocab_size=2,
        initializer_range=args.init_method_std,
        layer_norm_eps=args.layernorm_epsilon,
        pad_token_id=padding,
        tie_word_embeddings=not args.untie_embeddings_and_output_weights,
    )


def without_types(config: Any, like: Tensor) -> tuple[str, Tensor]:
    """Return the token types of a model that has none: zeros.

    MegatronBert always adds them.

    Args:
        like: Another parameter.
    """
    return TOKEN_TYPES, like.new_zeros(config.type_vocab_size, config.hidden_size)


def notes(family: str, config: Any) -> list[str]:
    """Return what to say of an exported model."""
    said = [f"activation: {config.hidden_act}, as the run's layers computed it"]
    if config.hidden_act in TANH_GELUS:
        said[0] += "; its language-model head computed the exact GELU, which differs a little"
    if family == "bert_mlm":
        said.append("a MegatronBertForMaskedLM: --bert-no-binary-head has no pooler or token types")
    return said


def check_config(config: Any, names: Iterable[str]) -> str:
    """Return the family of a MegatronBert that Megatron can hold.

    Args:
        names: Of the parameters in the folder, with those of the buffers left out.

    Raises:
        ConversionError: Megatron's BertModel would compute something else.
    """
    problems = wrong_settings(
        config,
        {
            "hidden_act": (*EXACT_GELUS, *TANH_GELUS),
            "type_vocab_size": (2,),
            "is_decoder": (False,),
            "add_cross_attention": (False,),
            "position_embedding_type": ("absolute",),
        },
    )
    names = list(names)
    if not any(name.startswith(_PREDICTIONS) for name in names):
        problems.append(
            f"there is no language-model head ({_PREDICTIONS}..), which Megatron's BertModel "
            "trains: give a MegatronBertForPreTraining or ForMaskedLM"
        )
    if problems:
        raise ConversionError("this model cannot be imported: " + "; ".join(problems))
    return "bert" if _SENTENCE_ORDER in names else "bert_mlm"


def drop_types(stored: dict[str, Callable[[], Tensor]]) -> None:
    """Take the token types of a model without a binary head out of its parameters.

    Raises:
        ConversionError: They are not zeros.
    """
    read = stored.pop(TOKEN_TYPES, None)
    if read is not None and read().any():
        raise ConversionError(
            f"{TOKEN_TYPES} is not zero, but Megatron's BertModel has token types only with a "
            "binary head: give a MegatronBertForPreTraining"
        )


def shape_of_config(config: Any) -> Shape:
    """Return the layout of the parameters of a Hugging Face model."""
    heads = config.num_attention_heads
    return Shape(
        config.num_hidden_layers, heads, heads, config.vocab_size, config.tie_word_embeddings
    )


def flags_of(family: str, config: Any) -> list[str]:
    """Return Megatron's flags for the model of a Hugging Face configuration."""
    flags = {
        "--num-layers": config.num_hidden_layers,
        "--hidden-size": config.hidden_size,
        "--num-attention-heads": config.num_attention_heads,
        "--max-position-embeddings": config.max_position_embeddings,
        "--ffn-hidden-size": config.intermediate_size,
        "--norm-epsilon": config.layer_norm_eps,
        "--attention-dropout": config.attention_probs_dropout_prob,
        "--hidden-dropout": config.hidden_dropout_prob,
    }
    bare = ["--bert-no-binary-head"] if family == "bert_mlm" else []
    if config.hidden_act in EXACT_GELUS:
        bare.append("--no-bias-gelu-fusion")
    if not config.tie_word_embeddings:
        bare.append("--untie-embeddings-and-output-weights")
    return [*(str(part) for pair in flags.items() for part in pair), *bare]
