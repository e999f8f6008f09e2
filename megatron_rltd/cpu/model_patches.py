"""What is replaced in Megatron's models so that they are built and run without a GPU.

Rows of the table `adapter.PATCHES`.
"""

from megatron_rltd.cpu import attention, modules
from megatron_rltd.patching.mechanism import Patch

_TE = "takes modules from Transformer Engine, of which Megatron's own have the same parameters"
_FLA = "flash-linear-attention's kernels need a GPU"
_GDN = "megatron.core.ssm.gated_delta_net"
_HYBRID = "megatron.core.models.hybrid"
_MLA = "megatron.core.transformer.multi_latent_attention"

MODEL: tuple[Patch, ...] = (
    Patch(
        "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
        modules.norm_under_sequence_parallel,
        "refuses sequence parallelism",
        parameters=("config",),
    ),
    Patch(
        "megatron.core.transformer.dot_product_attention:DotProductAttention.__init__",
        attention.attention_init,
        "refuses context parallelism, and values of another head size than keys",
        parameters=("config",),
    ),
    Patch(
        "megatron.core.transformer.dot_product_attention:DotProductAttention.forward",
        attention.attention_forward,
        "knows only this rank's part of a context-parallel sequence",
        parameters=("query", "key", "value", "attention_mask"),
    ),
    Patch(
        f"{_MLA}:MLASelfAttention._qkv_down_projection",
        attention.latent_down_projection,
        "under TP, each rank's gradient of the key positions misses the other ranks' heads",
        parameters=("hidden_states",),
    ),
    Patch(f"{_MLA}:TELinear", modules.local_module("TELinear"), _TE, copies=("megatron",)),
    Patch(
        f"{_HYBRID}.hybrid_layer_specs:hybrid_stack_spec.submodules",
        modules.local_modules,
        _TE,
        since=(0, 18),
    ),
    Patch(
        "megatron.core.models.backends:LocalSpecProvider.column_parallel_layer_norm_linear",
        modules.layer_norm_linear,
        "knows no such layer, and latent attention in a HybridModel normalizes in one",
        since=(0, 19),
    ),
    Patch(f"{_GDN}.common:HAVE_FLA", lambda original: True, _FLA, since=(0, 19)),
    Patch(f"{_GDN}.common:l2norm", attention.l2norm, _FLA, copies=("",), since=(0, 19)),
    Patch(
        f"{_GDN}.gdn:causal_conv1d",
        attention.causal_conv1d,
        _FLA,
        copies=("",),
        since=(0, 19),
    ),
    Patch(
        f"{_GDN}.gdn:chunk_gated_delta_rule",
        attention.chunk_gated_delta_rule,
        _FLA,
        copies=("",),
        since=(0, 19),
    ),
    Patch(
        f"{_HYBRID}.hybrid_block:TENorm",
        modules.local_module("TENorm"),
        _TE,
        copies=("megatron",),
        since=(0, 18),
    ),
    Patch(
        "megatron.core.tensor_parallel.layers:reduce_from_tensor_model_parallel_region",
        modules.reduce_from_tensor_model_parallel_region,
        "MoE layers with biases write to its output, and torch does not allow that",
        parameters=("input_", "group"),
        copies=("megatron",),
    ),
)
