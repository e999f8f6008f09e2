"""Small Megatron-core GPTs in float64 in one process, and random-LTD on them by plain loops."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

VOCAB, SEQ, BATCH = 31, 16, 3


@contextlib.contextmanager
def one_process(with_adapter: bool = True) -> Iterator[None]:
    """Megatron's parallel state for a single CPU process, whose device is the CPU or already is."""
    from megatron_rltd.cpu import adapter

    device = adapter.enabled() if with_adapter else contextlib.nullcontext()
    with device, tempfile.TemporaryDirectory() as folder:
        from megatron.core import parallel_state, tensor_parallel

        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{Path(folder) / 'store'}", rank=0, world_size=1
        )
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


def config(**options):
    """Return a small TransformerConfig without dropout and fused kernels."""
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    kind = MLATransformerConfig if options.get("multi_latent_attention") else TransformerConfig
    return kind(
        **{
            "hidden_size": 16,
            "num_attention_heads": 4,
            "use_cpu_initialization": True,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "masked_softmax_fusion": False,
            "bias_activation_fusion": False,
            "gradient_accumulation_fusion": False,
            "apply_rope_fusion": False,
            **options,
        }
    )


def build(rotary=None, num_layers=6, rotary_percent=1.0, **options):
    """Return a float64 GPTModel with random weights, biases and norms, in training mode."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    settings = config(num_layers=num_layers, **options)
    model = GPTModel(
        settings,
        get_gpt_decoder_block_spec(
            settings, use_transformer_engine=False, normalization=settings.normalization
        ),
        vocab_size=VOCAB,
        max_sequence_length=SEQ,
        position_embedding_type=rotary or "learned_absolute",
        rotary_percent=rotary_percent,
    ).double()
    return with_random_weights(model)


def with_random_weights(model):
    """Return a model whose weights, biases and norms are random, in training mode."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
            )
    return model.train()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, labels and positions, [b, s] each."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCAB, (BATCH, SEQ + 1), generator=generator)
    positions = torch.arange(SEQ).expand(BATCH, -1)
    return tokens[:, :-1], tokens[:, 1:], positions


def document_mask() -> Tensor:
    """Return a causal mask of two documents a sample, [b, 1, s, s], True where masked."""
    mask = torch.ones(SEQ, SEQ).triu(1).bool().repeat(BATCH, 1, 1, 1)
    for sample, start in enumerate((5, 9, 12)):
        mask[sample, 0, start:, :start] = True
    return mask


def plain_loss(model, kept: dict[int, Tensor], mask: Tensor | None = None) -> Tensor:
    """Return the mean loss of `batch`, each dropped layer run sample by sample.

    Args:
        kept: Layer number to kept positions, [b, k].
    """
    tokens, labels, positions = batch()
    hidden = model.embedding(input_ids=tokens, position_ids=positions)
    rotary = model.rotary_pos_emb(SEQ) if hasattr(model, "rotary_pos_emb") else None
    hidden = plain_layers(model.decoder.layers, hidden, kept, mask, rotary)
    hidden = model.decoder.final_layernorm(hidden)
    logits, _ = model.output_layer(hidden)
    return cross_entropy(logits.transpose(0, 1), labels)


def plain_layers(layers, hidden, kept, mask=None, rotary=None) -> Tensor:
    """Return the hidden states [s, b, h] after all layers, each run sample by sample."""
    for layer in layers:
        indices = kept.get(layer.layer_number)
        samples = []
        for j in range(BATCH):
            index = torch.arange(SEQ) if indices is None else indices[j].long()
            own = mask
            if mask is not None:  # True where masked: [b, 1, s or 1, s]
                own = mask[j : j + 1].expand(-1, -1, SEQ, -1)[:, :, index][:, :, :, index]
            out, _ = type(layer).forward(
                layer,
                hidden_states=hidden[index, j : j + 1],
                attention_mask=own,
                rotary_pos_emb=None if rotary is None else rotary[index],
            )
            samples.append(hidden[:, j].index_copy(0, index, out[:, 0]))
        hidden = torch.stack(samples, dim=1)
    return hidden


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss of logits [b, s, v]; Megatron's own would compute it in float32."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def loss_of(model, mask: Tensor | None = None) -> Tensor:
    """Return the mean loss of `batch` by the model's own forward."""
    tokens, labels, positions = batch()
    return cross_entropy(model(tokens, positions, mask), labels)
