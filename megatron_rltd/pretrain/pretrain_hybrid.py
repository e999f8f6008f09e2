"""Pretrain a HybridModel as `pretrain_gpt` pretrains a GPT, from Megatron-core 0.19 on.

It is for people without a checkout of Megatron-LM, whose pretrain_hybrid.py does the same and more.

    python -m megatron_rltd pretrain_hybrid --hybrid-layer-pattern '*-*-*-*-' ... --data-path PREFIX

Without ``--spec``, the layers are those of Megatron's ``hybrid_stack_spec``.
"""

from megatron.core.enums import ModelType
from megatron.training import pretrain

from megatron_rltd.config import ConfigError
from megatron_rltd.patching import versions
from megatron_rltd.pretrain.pretrain_gpt import check_data_path, datasets_provider, forward_step

SPEC = ["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"]


def main() -> None:
    """Parse Megatron's arguments and train.

    Raises:
        ConfigError: There is no layer pattern, or this Megatron has no builder of HybridModels.
    """
    if versions.release() < (0, 19):
        version = versions.megatron_version()
        raise ConfigError([f"pretrain_hybrid needs megatron-core 0.19 or newer, not {version}"])
    from megatron.training.argument_utils import (
        hybrid_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    if args.hybrid_layer_pattern is None:
        raise ConfigError(["there are no layers: give --hybrid-layer-pattern, such as '*-*-*-*-'"])
    args.spec = args.spec or SPEC
    check_data_path(args, "pretrain_hybrid.py")
    config = pretrain_cfg_container_from_args(args, hybrid_config_from_args(args))
    pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main()
