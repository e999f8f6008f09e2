"""The parameters of each family by Megatron's name and Hugging Face's, and how they differ.

Megatron's names are those of its distributed checkpoints, where a norm belongs to the linear layer
behind it, as Transformer Engine has it; the local layers are stored under the same names.
"""

from collections.abc import Iterable
from typing import NamedTuple

# How Megatron's tensor becomes Hugging Face's: (of Megatron, the names there). Both ways.
SAME, TRANSPOSED, HEADS, NORM, ROWS, ROWS_TWICE, BATCHED, GATED, QKV, STACKED_QKV, FUSED_QKV = (
    "same transposed heads norm rows rows_twice batched gated qkv stacked_qkv fused_qkv".split()
)
Names = dict[str, tuple[str, tuple[str, ...]]]

_GPT2_LAYER: Names = {
    "self_attention.linear_qkv.layer_norm_weight": (NORM, ("ln_1.weight",)),
    "self_attention.linear_qkv.layer_norm_bias": (SAME, ("ln_1.bias",)),
    "self_attention.linear_qkv.weight": (FUSED_QKV, ("attn.c_attn.weight",)),
    "self_attention.linear_qkv.bias": (FUSED_QKV, ("attn.c_attn.bias",)),
    "self_attention.linear_proj.weight": (HEADS, ("attn.c_proj.weight",)),
    "self_attention.linear_proj.bias": (SAME, ("attn.c_proj.bias",)),
    "mlp.linear_fc1.layer_norm_weight": (NORM, ("ln_2.weight",)),
    "mlp.linear_fc1.layer_norm_bias": (SAME, ("ln_2.bias",)),
    "mlp.linear_fc1.weight": (TRANSPOSED, ("mlp.c_fc.weight",)),
    "mlp.linear_fc1.bias": (SAME, ("mlp.c_fc.bias",)),
    "mlp.linear_fc2.weight": (TRANSPOSED, ("mlp.c_proj.weight",)),
    "mlp.linear_fc2.bias": (SAME, ("mlp.c_proj.bias",)),
}
_GPT2: Names = {
    "embedding.word_embeddings.weight": (ROWS, ("transformer.wte.weight",)),
    "embedding.position_embeddings.weight": (SAME, ("transformer.wpe.weight",)),
    "decoder.final_layernorm.weight": (NORM, ("transformer.ln_f.weight",)),
    "decoder.final_layernorm.bias": (SAME, ("transformer.ln_f.bias",)),
    "output_layer.weight": (ROWS, ("lm_head.weight",)),
}
_LLAMA_LAYER: Names = {
    "self_attention.linear_qkv.layer_norm_weight": (NORM, ("input_layernorm.weight",)),
    "self_attention.linear_qkv.weight": (
        QKV,
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    ),
    "self_attention.linear_proj.weight": (SAME, ("self_attn.o_proj.weight",)),
    "mlp.linear_fc1.layer_norm_weight": (NORM, ("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.weight": (GATED, ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": (SAME, ("mlp.down_proj.weight",)),
}
_LLAMA: Names = {
    "embedding.word_embeddings.weight": (ROWS, ("model.embed_tokens.weight",)),
    "decoder.final_layernorm.weight": (NORM, ("model.norm.weight",)),
    "output_layer.weight": (ROWS, ("lm_head.weight",)),
}
# BertModel, whose norms are before attention and MLP: transformers' MegatronBert.
_BERT_LAYER: Names = {
    "self_attention.linear_qkv.layer_norm_weight": (NORM, ("attention.ln.weight",)),
    "self_attention.linear_qkv.layer_norm_bias": (SAME, ("attention.ln.bias",)),
    "self_attention.linear_qkv.weight": (
        QKV,
        tuple(f"attention.self.{name}.weight" for name in ("query", "key", "value")),
    ),
    "self_attention.linear_qkv.bias": (
        QKV,
        tuple(f"attention.self.{name}.bias" for name in ("query", "key", "value")),
    ),
    "self_attention.linear_proj.weight": (SAME, ("attention.output.dense.weight",)),
    "self_attention.linear_proj.bias": (SAME, ("attention.output.dense.bias",)),
    "mlp.linear_fc1.layer_norm_weight": (NORM, ("ln.weight",)),
    "mlp.linear_fc1.layer_norm_bias": (SAME, ("ln.bias",)),
    "mlp.linear_fc1.weight": (SAME, ("intermediate.dense.weight",)),
    "mlp.linear_fc1.bias": (SAME, ("intermediate.dense.bias",)),
    "mlp.linear_fc2.weight": (SAME, ("output.dense.weight",)),
    "mlp.linear_fc2.bias": (SAME, ("output.dense.bias",)),
}
TOKEN_TYPES = "bert.embeddings.token_type_embeddings.weight"
_BERT_MLM: Names = {
    "embedding.word_embeddings.weight": (ROWS, ("bert.embeddings.word_embeddings.weight",)),
    "embedding.position_embeddings.weight": (
        SAME,
        ("bert.embeddings.position_embeddings.weight",),
    ),
    "encoder.final_layernorm.weight": (NORM, ("bert.encoder.ln.weight",)),
    "encoder.final_layernorm.bias": (SAME, ("bert.encoder.ln.bias",)),
    "lm_head.dense.weight": (SAME, ("cls.predictions.transform.dense.weight",)),
    "lm_head.dense.bias": (SAME, ("cls.predictions.transform.dense.bias",)),
    "lm_head.layer_norm.weight": (NORM, ("cls.predictions.transform.LayerNorm.weight",)),
    "lm_head.layer_norm.bias": (SAME, ("cls.predictions.transform.LayerNorm.bias",)),
    "output_layer.weight": (ROWS, ("cls.predictions.decoder.weight",)),
    "output_layer.bias": (ROWS, ("cls.predictions.bias",)),
}
_BERT: Names = _BERT_MLM | {
    "embedding.tokentype_embeddings.weight": (SAME, (TOKEN_TYPES,)),
    "pooler.dense.weight": (SAME, ("bert.pooler.dense.weight",)),
    "pooler.dense.bias": (SAME, ("bert.pooler.dense.bias",)),
    "binary_head.weight": (SAME, ("cls.seq_relationship.weight",)),
    "binary_head.bias": (SAME, ("cls.seq_relationship.bias",)),
}

# `megatron_rltd.vision.classifier.ViTClassifier`: transformers' ViTForImageClassification.
_VIT_LAYER: Names = {
    "self_attention.linear_qkv.layer_norm_weight": (NORM, ("layernorm_before.weight",)),
    "self_attention.linear_qkv.layer_norm_bias": (SAME, ("layernorm_before.bias",)),
    "self_attention.linear_qkv.weight": (
        QKV,
        tuple(f"attention.attention.{name}.weight" for name in ("query", "key", "value")),
    ),
    "self_attention.linear_qkv.bias": (
        QKV,
        tuple(f"attention.attention.{name}.bias" for name in ("query", "key", "value")),
    ),
    "self_attention.linear_proj.weight": (SAME, ("attention.output.dense.weight",)),
    "self_attention.linear_proj.bias": (SAME, ("attention.output.dense.bias",)),
    "mlp.linear_fc1.layer_norm_weight": (NORM, ("layernorm_after.weight",)),
    "mlp.linear_fc1.layer_norm_bias": (SAME, ("layernorm_after.bias",)),
    "mlp.linear_fc1.weight": (SAME, ("intermediate.dense.weight",)),
    "mlp.linear_fc1.bias": (SAME, ("intermediate.dense.bias",)),
    "mlp.linear_fc2.weight": (SAME, ("output.dense.weight",)),
    "mlp.linear_fc2.bias": (SAME, ("output.dense.bias",)),
}
_VIT: Names = {
    "conv1.weight": (SAME, ("vit.embeddings.patch_embeddings.projection.weight",)),
    "conv1.bias": (SAME, ("vit.embeddings.patch_embeddings.projection.bias",)),
    "class_token": (SAME, ("vit.embeddings.cls_token",)),
    "position_embeddings.weight": (BATCHED, ("vit.embeddings.position_embeddings",)),
    "final_layernorm.weight": (SAME, ("vit.layernorm.weight",)),
    "final_layernorm.bias": (SAME, ("vit.layernorm.bias",)),
    "head.weight": (SAME, ("classifier.weight",)),
    "head.bias": (SAME, ("classifier.bias",)),
}
_TIMM_LAYER: Names = {
    "self_attention.linear_qkv.layer_norm_weight": (NORM, ("norm1.weight",)),
    "self_attention.linear_qkv.layer_norm_bias": (SAME, ("norm1.bias",)),
    "self_attention.linear_qkv.weight": (STACKED_QKV, ("attn.qkv.weight",)),
    "self_attention.linear_qkv.bias": (STACKED_QKV, ("attn.qkv.bias",)),
    "self_attention.linear_proj.weight": (SAME, ("attn.proj.weight",)),
    "self_attention.linear_proj.bias": (SAME, ("attn.proj.bias",)),
    "mlp.linear_fc1.layer_norm_weight": (NORM, ("norm2.weight",)),
    "mlp.linear_fc1.layer_norm_bias": (SAME, ("norm2.bias",)),
    "mlp.linear_fc1.weight": (SAME, ("mlp.fc1.weight",)),
    "mlp.linear_fc1.bias": (SAME, ("mlp.fc1.bias",)),
    "mlp.linear_fc2.weight": (SAME, ("mlp.fc2.weight",)),
    "mlp.linear_fc2.bias": (SAME, ("mlp.fc2.bias",)),
}
_TIMM: Names = {
    "conv1.weight": (SAME, ("patch_embed.proj.weight",)),
    "conv1.bias": (SAME, ("patch_embed.proj.bias",)),
    "class_token": (SAME, ("cls_token",)),
    "position_embeddings.weight": (BATCHED, ("pos_embed",)),
    "final_layernorm.weight": (SAME, ("norm.weight",)),
    "final_layernorm.bias": (SAME, ("norm.bias",)),
    "head.weight": (SAME, ("head.weight",)),
    "head.bias": (SAME, ("head.bias",)),
}


class Family(NamedTuple):
    """How a kind of model is stored on both sides."""

    title: str
    of_model: Names
    """What is not in a layer."""
    of_layer: Names
    theirs: str
    """Where Hugging Face keeps layers."""
    layers: str = "decoder.layers"
    """Where Megatron does."""
    with_extra_state: tuple[str, ...] = ("decoder.final_layernorm",)
    """Megatron's modules outside of layers for which FP8 scales are stored, if only as None."""


_IN_ENCODER = ("encoder.layers", ("encoder.final_layernorm", "output_layer"))
FAMILIES = {
    "gpt2": Family("GPT-2", _GPT2, _GPT2_LAYER, "transformer.h"),
    "llama": Family("Llama", _LLAMA, _LLAMA_LAYER, "model.layers"),
    "bert": Family("MegatronBert", _BERT, _BERT_LAYER, "bert.encoder.layer", *_IN_ENCODER),
    # Of --bert-no-binary-head: without token types, too.
    "bert_mlm": Family("MegatronBert", _BERT_MLM, _BERT_LAYER, "bert.encoder.layer", *_IN_ENCODER),
    "vit": Family("ViT", _VIT, _VIT_LAYER, "vit.encoder.layer", with_extra_state=()),
    "timm": Family("ViT", _TIMM, _TIMM_LAYER, "blocks", with_extra_state=()),
}

# {of a Hugging Face configuration: how the names of the model's parameters begin}
MODEL_TYPES = {"gpt2": "transformer.", "llama": "model.", "megatron-bert": "bert.", "vit": "vit."}


def family_of(names: Iterable[str]) -> str | None:
    """Return the family of a checkpoint as far as its parameters' names tell it.

    Args:
        names: Of Megatron's parameters.

    Returns:
        None for a GPT, of which GPT-2's and Llama's have the same names.
    """
    names = list(names)
    if any(name.startswith("encoder.layers.") for name in names):
        return "bert" if "binary_head.weight" in names else "bert_mlm"
    if "conv1.weight" in names:
        return "vit"
    return None


# MegatronBert names the bias of its output layer twice. Only if embeddings are tied, it is one, and
# is stored under the second name. What else tied embeddings need not have follows.
_BIASES = ("cls.predictions.decoder.bias", "cls.predictions.bias")
UNTIED_BIAS = (ROWS_TWICE, _BIASES)
TIED = ("lm_head.weight", "cls.predictions.decoder.weight", _BIASES[0])
# What is no parameter, and is computed anew.
BUFFERS = (".position_ids", ".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
