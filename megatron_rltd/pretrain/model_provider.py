"""The GPT of `pretrain_gpt` on Megatron before 0.19. There the script must build the model."""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.spec_utils import import_module
from megatron.training import get_args
from megatron.training.arguments import core_transformer_config_from_args

from megatron_rltd.config import ConfigError

# With these flags, Megatron-LM's script builds another model than the one below.
OTHER_MODELS = (
    "--experimental-attention-variant",
    "--heterogeneous-layers-config-path",
    "--use-grouped-gemm-for-dense-mlp",
    "--use-legacy-models",
)


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> torch.nn.Module:
    """Build a pipeline stage of the model that Megatron's arguments ask for, dense or with experts.

    Args:
        pre_process: Whether it is the first stage, with the embedding.
        post_process: Whether it is the last, with the loss.

    Raises:
        ConfigError: The arguments ask for another kind of model.
    """
    args = get_args()
    asked = [flag for flag in OTHER_MODELS if getattr(args, flag[2:].replace("-", "_"), None)]
    if asked:
        raise ConfigError(
            [
                f"{flag} does not work with this script: use the pretrain_gpt.py of Megatron-LM"
                for flag in asked
            ]
        )
    config = config or core_transformer_config_from_args(args)
    use_te = config.transformer_impl == "transformer_engine"
    norms = {"normalization": config.normalization, "qk_l2_norm": config.qk_l2_norm}
    if args.spec is None:
        layers = get_gpt_decoder_block_spec(config, use_te, **norms, vp_stage=vp_stage)
    else:
        layers = import_module(args.spec)
    multi_token_prediction = None
    if args.mtp_num_layers:
        # Made like the last layer of the whole model, which another stage may hold.
        last = get_gpt_decoder_layer_specs(config, use_te, **norms)[-1]
        multi_token_prediction = get_gpt_mtp_block_spec(config, last, use_te, vp_stage=vp_stage)
    return GPTModel(
        config,
        layers,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        mtp_block_spec=multi_token_prediction,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )
