"""An image classifier on megatron-core's own ViT, and what a checkpoint gives it.

The body is ``CLIPViTModel`` of the subtype "internvit": patches by a convolution with a bias, a
class token, learned positions, pre-norm layers. With a norm and a linear head on the class token it
is the ViT of timm and of Hugging Face. Parameters:

    conv1.{weight,bias}  class_token  position_embeddings.weight  decoder.layers.N.*
    final_layernorm.{weight,bias}  head.{weight,bias}

Shapes: b images, c channels, s patches and class token, h hidden size.
"""

import types
from typing import Any

import torch
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.models.vision.vit_layer_specs import (
    get_vit_layer_with_local_spec,
    get_vit_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_rltd.config import ConfigError

HEAD, POSITIONS, PATCHES = "head.weight", "position_embeddings.weight", "conv1.weight"


class ViTClassifier(CLIPViTModel):
    """A ViT with a linear head on its class token.

    Every tensor-parallel rank holds all that is outside of the layers.

    Attributes:
        fresh_head: Whether the next checkpoint that is loaded leaves the head as it is.
    """

    def __init__(
        self,
        config: Any,
        spec: ModuleSpec,
        num_classes: int,
        img_h: int,
        img_w: int,
        patch_dim: int,
        num_channels: int = 3,
        pg_collection: Any = None,
        vp_stage: int | None = None,
    ):
        """Build it with random weights.

        Args:
            config: A ``TransformerConfig``.
            spec: Of a layer, from `layer_spec`.
            img_h, img_w, patch_dim: In pixels; the patch size divides both sides.
        """
        super().__init__(
            config,
            spec,
            patch_dim=patch_dim,
            img_h=img_h,
            img_w=img_w,
            model_subtype="internvit",
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        width, dtype = config.hidden_size, config.params_dtype
        # Megatron's own has always 3 channels.
        self.conv1 = torch.nn.Conv2d(num_channels, width, patch_dim, stride=patch_dim)
        self.final_layernorm = torch.nn.LayerNorm(width, config.layernorm_epsilon, dtype=dtype)
        self.head = torch.nn.Linear(width, num_classes, dtype=dtype)
        if config.perform_initialization:
            # Megatron's positions and class token have a standard deviation of 1. The convolution
            # keeps torch's weights, which suit patches of any size.
            for weight in (self.position_embeddings.weight, self.class_token, self.head.weight):
                config.init_method(weight)
            torch.nn.init.zeros_(self.head.bias)
        self.fresh_head = False
        self.register_load_state_dict_pre_hook(_keep_fresh_head)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits of the classes, [b, classes], of images [b, c, height, width]."""
        hidden = super().forward(images.to(self.conv1.weight.dtype))
        return self.head(self.final_layernorm(hidden[:, 0]))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Return what a distributed checkpoint holds; without the head, if it is to stay fresh."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.fresh_head:
            state = {k: v for k, v in state.items() if not k.startswith(f"{prefix}head.")}
        return state


def _keep_fresh_head(model: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    if model.fresh_head:
        for name, value in model.head.state_dict().items():
            state[f"{prefix}head.{name}"] = value
        model.fresh_head = False


def layer_spec(use_transformer_engine: bool) -> ModuleSpec:
    """Return Megatron's spec of a ViT layer, with bidirectional attention.

    Its keys in a distributed checkpoint are the same with and without Transformer Engine.
    """
    if use_transformer_engine:
        return get_vit_layer_with_transformer_engine_spec()
    spec = get_vit_layer_with_local_spec()
    # Megatron 0.17 has a causal mask here.
    spec.submodules.self_attention.params = {"attn_mask_type": AttnMaskType.no_mask}
    # As Megatron's own GPT layers have (``megatron/core/models/gpt/gpt_layer_specs.py``).
    spec.submodules.sharded_state_dict_keys_map = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    return spec


def choose_head(model: ViTClassifier, args: Any) -> str | None:
    """Decide whether a checkpoint that Megatron is about to load leaves the head fresh.

    Weights to fine-tune may have other classes, or no head. A run that continues may not.

    Args:
        args: Megatron's, with ``fresh_head``.

    Returns:
        What to tell the user, or None.

    Raises:
        ConfigError: The weights do not fit the flags.
    """
    from megatron.training.checkpointing import checkpoint_exists

    if checkpoint_exists(args.load):
        folder, is_finetuning = args.load, args.finetune
    elif checkpoint_exists(args.pretrained_checkpoint):
        folder, is_finetuning = args.pretrained_checkpoint, True
    else:
        return None
    shapes = checkpoint_shapes(folder, getattr(args, "ckpt_step", None))
    if shapes is None:
        return None
    state = model.state_dict()
    problems = [
        f"{folder} has {name} of the shape {shapes.get(name)}, these flags give "
        f"{tuple(state[name].shape)}: --img-h, --img-w, --patch-dim, --num-channels and "
        "--hidden-size must be those of the weights"
        for name in (POSITIONS, PATCHES)
        if shapes.get(name) != tuple(state[name].shape)
    ]
    if problems:
        raise ConfigError(problems)
    ours, theirs = tuple(state[HEAD].shape), shapes.get(HEAD)
    if not is_finetuning:
        if theirs != ours:
            raise ConfigError(
                [
                    f"--num-classes {ours[0]}, but the run in --load {folder} has "
                    f"{theirs[0] if theirs else 'no head'}: give its number to continue it, or add "
                    "--finetune to start another from its weights, with a fresh head"
                ]
            )
        return None
    model.fresh_head = bool(args.fresh_head or theirs != ours)
    if not model.fresh_head:
        return f"the head is that of {folder}"
    found = f"has {theirs[0]} classes" if theirs else "has no head"
    return f"the head is fresh: {folder} {found}, this run {ours[0]}"


def checkpoint_shapes(folder: str, iteration: int | None) -> dict[str, tuple[int, ...]] | None:
    """Return name to shape of the tensors in a distributed checkpoint; None if it is another kind.

    Args:
        folder: Of checkpoints, as in ``--load``.
        iteration: Which one; None for the newest.
    """
    from megatron.core.dist_checkpointing import load_tensors_metadata
    from megatron.core.dist_checkpointing.core import check_is_distributed_checkpoint
    from megatron.training.checkpointing import get_load_checkpoint_path_by_args

    path = get_load_checkpoint_path_by_args(types.SimpleNamespace(load=folder, ckpt_step=iteration))
    if not check_is_distributed_checkpoint(path):
        return None
    found = load_tensors_metadata(path)
    return {key: tuple(tensor.global_shape) for key, tensor in found.items()}
