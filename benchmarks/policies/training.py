"""Train one small model with one policy: a loop on megatron-core, without Megatron's start-up.

Shapes: b samples, s sequence length.
"""

from typing import Any

import torch
from lib.samples import blocks, order
from lib.small_models import EVALUATED, learning_rate  # before Megatron
from torch import Tensor

from megatron_rltd import RandomLTD

# isort: split
from megatron.core import tensor_parallel
from megatron.core.models.bert import bert_layer_specs
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig

from policies.arms import Arm, Size
from policies.samples import (
    CAUSAL,
    END_OF_DOCUMENT,
    EVALUATION_SEED,
    MASK_ID,
    VOCABULARY,
    Batch,
    batch,
)


def build(task: str, size: Size, seed: int) -> Any:
    """Return a new model of a task; its initial weights depend on the seed only."""
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    config = TransformerConfig(
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        num_attention_heads=size.heads,
        init_method_std=size.init_std,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )
    shape = {"vocab_size": VOCABULARY[task], "max_sequence_length": size.seq_length}
    shape["position_embedding_type"] = "rope"  # models this small learn with it much sooner
    if task == CAUSAL:
        return GPTModel(config, get_gpt_layer_local_spec(), **shape).cuda()
    spec = bert_layer_specs.bert_layer_local_spec
    return BertModel(config, 0, spec, add_binary_head=False, **shape).cuda()


def token_losses(model: Any, own: Batch) -> Tensor:
    """Return the loss of every label that counts, in one dimension."""
    ids, labels = own.ids.cuda(), own.labels.cuda()
    if isinstance(model, BertModel):
        losses, _ = model(ids, torch.ones_like(ids), lm_labels=labels)
        return losses[labels >= 0]
    positions = torch.arange(ids.size(1), device=ids.device).expand_as(ids)
    return model(ids, positions, None, labels=labels).flatten()


def train(task: str, arm: Arm, size: Size, seed: int, tokens: Tensor) -> tuple[Any, int]:
    """Train a model from scratch; return it and the LayerTokens it has processed.

    Args:
        tokens: The training text, more of it than the run reads.
    """
    model = build(task, size, seed)
    random_ltd = None
    layer_tokens = 0
    if (config := arm.config(size)) is not None:
        random_ltd = RandomLTD(config).attach(
            model,
            size.seq_length,
            seed=seed,
            micro_batch_size=size.batch_size,
            always_kept=[END_OF_DOCUMENT, MASK_ID[task]],
        )
    settings = {"lr": size.lr, "betas": (0.9, 0.95), "weight_decay": 0.01, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    text = blocks(tokens, size.seq_length)
    numbers = order(len(text), seed)
    warm_up = max(1, size.steps // 10)
    for step in range(size.steps):
        first = step * size.batch_size
        if random_ltd is not None:
            random_ltd.begin_step(step, first)
            random_ltd.begin_micro_batch(0)
        own = batch(task, text[numbers[first : first + size.batch_size]], seed, first)
        token_losses(model, own).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            # With a constant kept length, all steps cost the same: by samples or by LayerTokens,
            # the schedule is the same one.
            group["lr"] = learning_rate(step, size.steps, size.lr, warm_up)
        optimizer.step()
        optimizer.zero_grad()
        if random_ltd is None:
            layer_tokens += own.ids.numel() * size.num_layers
        else:
            layer_tokens += random_ltd.end_step().layer_tokens_per_sample * size.batch_size
    return model, layer_tokens


@torch.no_grad()
def evaluate(model: Any, task: str, size: Size, tokens: Tensor) -> float:
    """Return the mean loss, nats per token, on all of a text at full length.

    The same tokens are masked for every model.
    """
    model.eval()
    text = blocks(tokens, size.seq_length)
    losses = [
        token_losses(model, batch(task, text[first : first + EVALUATED], EVALUATION_SEED, first))
        for first in range(0, len(text), EVALUATED)
    ]
    model.train()
    return float(torch.cat(losses).double().mean())
