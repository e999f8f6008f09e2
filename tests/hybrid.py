"""Small HybridModels in float64 in one process, and their layers by plain loops.

Their attention and MLP layers are the two halves of a local GPT layer. A plain recurrence stands in
for Mamba, which needs a GPU.
"""

import dataclasses

import torch
from torch import Tensor

from tests import gpt


class Recurrence(torch.nn.Module):
    """A layer in Mamba's place: its state passes over every position, h <- 0.7 h + W x."""

    def __init__(self, config, layer_number, **kwargs):
        super().__init__()
        self.config, self.layer_number = config, layer_number
        self.proj = torch.nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, attention_mask=None, inference_context=None, **kwargs):
        assert kwargs.keys() <= {"rotary_pos_emb", "packed_seq_params"}, "Mamba takes no others"
        state, states = torch.zeros_like(hidden_states[0]), []
        for row in self.proj(hidden_states):
            state = 0.7 * state + row
            states.append(state)
        return hidden_states + torch.stack(states)


def stack_spec(num_experts=None, is_latent=False):
    """Return a HybridStack's spec of modules that need no GPU, without a final norm."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec

    def layer(mlp: bool, experts=None, latent=False):
        whole = get_gpt_layer_local_spec(experts, multi_latent_attention=latent)
        half = {
            "pre_mlp_layernorm": IdentityOp,
            "mlp": IdentityOp,
            "mlp_bda": IdentityFuncOp,
        }
        if mlp:
            half = {
                "input_layernorm": IdentityOp,
                "self_attention": IdentityOp,
                "self_attn_bda": IdentityFuncOp,
            }
        return dataclasses.replace(whole, submodules=dataclasses.replace(whole.submodules, **half))

    # Megatron 0.18 has no such layer.
    latent = {"mla_layer": layer(mlp=False, latent=True)} if is_latent else {}
    return ModuleSpec(
        module=HybridStack,
        params={"post_layer_norm": False},
        submodules=HybridStackSubmodules(
            mamba_layer=ModuleSpec(module=Recurrence),
            attention_layer=layer(mlp=False),
            mlp_layer=layer(mlp=True),
            moe_layer=layer(mlp=True, experts=num_experts or 4),
            **latent,
        ),
    )


def build(pattern, rotary=None, **options):
    """Return a float64 HybridModel with random weights, in training mode."""
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    settings = gpt.config(num_layers=len(pattern.replace("|", "")), is_hybrid_model=True, **options)
    model = HybridModel(
        settings,
        stack_spec(settings.num_moe_experts, settings.multi_latent_attention),
        vocab_size=gpt.VOCAB,
        max_sequence_length=gpt.SEQ,
        hybrid_layer_pattern=pattern,
        position_embedding_type=rotary or "learned_absolute",
    ).double()
    return gpt.with_random_weights(model)


def plain_loss(model, kept: dict[int, Tensor], mask: Tensor | None = None) -> Tensor:
    """Return the mean loss of `gpt.batch`, each dropped layer run sample by sample.

    Args:
        kept: Megatron's layer number to kept positions, [b, k].
    """
    tokens, labels, positions = gpt.batch()
    hidden = model.embedding(input_ids=tokens, position_ids=positions)
    rotary = model.rotary_pos_emb(gpt.SEQ) if hasattr(model, "rotary_pos_emb") else None
    for layer in model.decoder.layers:
        if isinstance(layer, Recurrence):
            hidden = _plain_recurrence(layer, hidden, kept.get(layer.layer_number))
        else:
            hidden = gpt.plain_layers([layer], hidden, kept, mask, rotary)
    logits, _ = model.output_layer(hidden)
    return gpt.cross_entropy(logits.transpose(0, 1), labels)


def _plain_recurrence(layer, hidden, indices) -> Tensor:
    samples = []
    for j in range(gpt.BATCH):
        index = torch.arange(gpt.SEQ) if indices is None else indices[j].long()
        out = Recurrence.forward(layer, hidden[index, j : j + 1])
        samples.append(hidden[:, j].index_copy(0, index, out[:, 0]))
    return torch.stack(samples, dim=1)
