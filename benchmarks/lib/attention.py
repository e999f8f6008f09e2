"""Which attention the layers of a benchmark's GPT have.

Megatron's own core attention for layers without Transformer Engine writes the whole matrix of
scores and takes its softmax in float32: on a GPU it would outweigh the rest of a layer, and what
dropping tokens saves of it is no saving that anyone has. Those layers get torch's fused attention
instead, by the specification that Megatron builds them from.

Shapes: s sequence length, b micro batch, a attention heads, g query groups, d head size.
"""

import functools
import importlib
import math
from typing import Any

import torch
from torch import Tensor

TRANSFORMER_ENGINE, SDPA, MEGATRON = "te", "sdpa", "megatron"
DESCRIBED = {
    TRANSFORMER_ENGINE: "Transformer Engine's, attention too",
    SDPA: "Megatron's local ones, plain torch, with torch's scaled_dot_product_attention",
    MEGATRON: "Megatron's local ones, plain torch, attention too: unfused, softmax in float32",
}


@functools.cache
def has_transformer_engine() -> bool:
    """Return whether Transformer Engine's layers can run here."""
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception:  # not there, or built for another torch or CUDA
        return False
    return torch.cuda.is_available()


def default_attention() -> str:
    """Return the attention that a training here would have, or the nearest to it."""
    return TRANSFORMER_ENGINE if has_transformer_engine() else SDPA


def is_causal_only(attention: str) -> bool:
    """Return whether it leaves out the masked half of the matrix."""
    return attention != MEGATRON


@functools.cache
def _attention_class() -> type[torch.nn.Module]:
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.module import MegatronModule

    class ScaledDotProductAttention(MegatronModule):
        """Causal attention by torch, in the place of Megatron's ``DotProductAttention``.

        Raises:
            ValueError: The model wants what this does not do.
        """

        def __init__(
            self,
            config: Any,
            layer_number: int,
            attn_mask_type: Any,
            attention_type: str,
            attention_dropout: float | None = None,
            softmax_scale: float | None = None,
            cp_comm_type: str | None = None,
            pg_collection: Any = None,
        ):
            super().__init__(config=config)
            dropout = config.attention_dropout if attention_dropout is None else attention_dropout
            if attn_mask_type != AttnMaskType.causal or attention_type != "self" or dropout:
                raise ValueError("scaled_dot_product_attention here is causal and without dropout")
            if config.window_size or config.softmax_type != "vanilla":
                raise ValueError("scaled_dot_product_attention has no window and no softmax offset")
            # What apply_query_key_layer_scaling divides it by is multiplied again in Megatron's.
            self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)

        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            attn_mask_type: Any = None,
            attention_bias: Tensor | None = None,
            packed_seq_params: Any = None,
        ) -> Tensor:
            """Return [s, b, a * d] of a query [s, b, a, d] and key and value [s, b, g, d]."""
            if any(x is not None for x in (attention_mask, attention_bias, packed_seq_params)):
                raise ValueError("scaled_dot_product_attention here takes no mask, bias or packing")
            query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
            context = torch.nn.functional.scaled_dot_product_attention(
                query,
                key,
                value,
                is_causal=True,
                scale=self.scale,
                enable_gqa=key.size(1) != query.size(1),
            )
            return context.permute(2, 0, 1, 3).flatten(2)

    return ScaledDotProductAttention


def layer_spec(attention: str) -> Any:
    """Return the specification of a GPT's layers with this attention."""
    from megatron.core.models.gpt import gpt_layer_specs as specs

    if attention == TRANSFORMER_ENGINE:
        return specs.get_gpt_layer_with_transformer_engine_spec()
    spec = specs.get_gpt_layer_local_spec()
    if attention == SDPA:
        spec.submodules.self_attention.submodules.core_attention = _attention_class()
    return spec
