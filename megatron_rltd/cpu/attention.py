"""Attention on the CPU: what Megatron leaves to Transformer Engine and flash-linear-attention.

Attention under context parallelism, on packed sequences and with latent keys and values, and the
two functions that gated delta nets take from elsewhere. Each function named after a symbol of
Megatron is a `patching.Patch` wrapper.

Shapes below: s sequence, b micro batch, n heads, d head size, c context-parallel size.
"""

import functools

import torch
from torch.nn import functional

from megatron_rltd.cpu.modules import replaced
from megatron_rltd.tokens.shards import context_parallel_strata


def attention_init(original):
    """Build torch's attention for any layout, and for keys and values of different head sizes.

    Under context parallelism it is built as if there were none. Multi-latent attention gives the
    sizes, and a softmax scale of its own, as it gives them to Transformer Engine's attention.
    """

    @functools.wraps(original)
    def init(self, config, *args, k_channels=None, v_channels=None, **kwargs):
        original(self, replaced(config, context_parallel_size=1), *args, **kwargs)
        self.config = config

    return init


def attention_forward(original):
    """Attention on packed sequences, under context parallelism and with any size of the values.

    Packed sequences are masked by document. Under context parallelism keys and values are
    all-gathered and masked by their true positions.
    """

    @functools.wraps(original)
    def forward(self, query, key, value, attention_mask, *args, **kwargs):
        # The original takes keys' head size for values'; multi-latent attention has two.
        self.hidden_size_per_partition = query.size(-2) * value.size(-1)
        packed = kwargs.pop("packed_seq_params", None)
        if packed is not None:
            mask = _document_mask(packed, query.size(0))
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            # [t, n * d], as Transformer Engine returns it: the caller cuts values out of that.
            return original(self, query, key, value, mask, *args, **kwargs).squeeze(1)
        if self.config.context_parallel_size > 1:
            key, value, attention_mask = _gather_context(self, query, key, value, attention_mask)
        return original(self, query, key, value, attention_mask, *args, **kwargs)

    return forward


def _document_mask(packed, tokens):
    """Return the causal mask of packed documents, bool [1, 1, t, t], True where masked."""
    padded = packed.cu_seqlens_q_padded
    offsets = packed.cu_seqlens_q if padded is None else padded
    row = torch.arange(tokens)
    document = torch.searchsorted(offsets[1:].long(), row, right=True)
    return ((document[:, None] != document) | (row[:, None] < row))[None, None]


def _gather_context(attention, query, key, value, attention_mask):
    """Return keys and values of the whole sequence, and the mask of this rank's queries.

    Args:
        query, key, value: [s/c, b, n, d], this rank's two chunks.
        attention_mask: None (causal) or bool [b, 1, s/c, s], True where masked.

    Returns:
        key and value [s, b, n, d] in the order of the sequence, and a mask [., 1, s/c, s].
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
    from megatron.core.transformer.enums import AttnMaskType

    group = parallel_state.get_context_parallel_group()
    rank, size = group.rank(), group.size()
    length = query.size(0) * size
    chunks = torch.arange(length).view(2 * size, -1)
    held = [chunks[context_parallel_strata(2 * size, r, size)].flatten() for r in range(size)]
    mine, order = held[rank], torch.cat(held).argsort()
    key = gather_from_sequence_parallel_region(key, group=group)[order]
    value = gather_from_sequence_parallel_region(value, group=group)[order]
    if attention_mask is None and attention.attn_mask_type == AttnMaskType.causal:
        attention_mask = (mine[:, None] < torch.arange(length)[None, :])[None, None]
    return key, value, attention_mask


class _SumGradients(torch.autograd.Function):
    """Return the input; sum its gradient over the group's ranks.

    Megatron's own of this kind loses the sum of strided gradients until Megatron 0.18
    (``megatron/core/tensor_parallel/mappings.py:_reduce``).
    """

    @staticmethod
    def forward(ctx, input_, group):
        ctx.group = group
        return input_.view_as(input_)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None


def latent_down_projection(original):
    """Let the gradient of multi-latent attention's key positions come from all heads.

    All heads share these positions, and each tensor-parallel rank has some of the heads. Megatron
    sums their gradients only behind a duplicated layer under sequence parallelism
    (``megatron/core/transformer/multi_latent_attention.py:get_query_key_value_tensors``). Otherwise
    each rank would train on the gradients of its own heads.
    """

    @functools.wraps(original)
    def project(self, hidden_states):
        from megatron.core.tensor_parallel import mappings

        queries, latent = original(self, hidden_states)
        group = self.linear_kv_up_proj.tp_group
        sizes = [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim]
        whole = latent.size(-1) == sum(sizes)
        if group.size() == 1 or (whole and self.config.sequence_parallel):
            return queries, latent
        if not whole:
            latent = mappings.gather_from_tensor_model_parallel_region(latent, group=group)
        if self.config.sequence_parallel:
            return queries, mappings.scatter_to_sequence_parallel_region(latent, group=group)
        compressed, positions = latent.split(sizes, dim=-1)
        positions = _SumGradients.apply(positions, group)
        return queries, torch.cat([compressed, positions], dim=-1)

    return project


def l2norm(original):
    """Normalize the last dimension, as ``fla.modules.l2norm`` does."""

    def norm(x, dim=-1, eps=1e-6):
        return x * torch.rsqrt(x.float().square().sum(dim, keepdim=True) + eps).to(x.dtype)

    return norm


def causal_conv1d(original):
    """Convolve every channel with its past, then SiLU, as ``fla.modules.convolution`` does."""

    def convolve(x, weight, bias=None, **kwargs):
        """Return the outputs [b, s, d] of x [b, s, d] and weight [d, w], and no final state."""
        past = functional.pad(x.transpose(1, 2), (weight.size(1) - 1, 0))
        y = functional.conv1d(past, weight.unsqueeze(1), bias, groups=weight.size(0))
        return functional.silu(y).transpose(1, 2), None

    return convolve


def chunk_gated_delta_rule(original):
    """Use the function of plain torch that Megatron has for its deterministic mode."""
    from megatron.core.ssm.gated_delta_net import common

    return common.torch_chunk_gated_delta_rule
