"""What Megatron's arguments and transformers' or timm's configuration say of the same ViT.

Megatron's side is `megatron_rltd.vision.classifier.ViTClassifier`, which `finetune_vit` trains.
timm itself is not needed: its folders are read as they are.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_config import (
    EXACT_GELUS,
    activation_of,
    differing,
    without_counterpart,
    wrong_settings,
)
from hf_weights import ConversionError, Shape
from torch import Tensor

MODEL_TYPE = "vit"
REQUIRED: dict[str, Any] = {
    "normalization": "LayerNorm",
    "swiglu": False,
    "add_bias_linear": True,
    "group_query_attention": False,
}
POOLER = ("vit.pooler.dense.weight", "vit.pooler.dense.bias")  # of a ViTModel; no classifier's
# Heads of timm's models by the size in their name; its folders do not say it otherwise.
TIMM_HEADS = {"tiny": 3, "small": 6, "base": 12} | dict.fromkeys(
    ("large", "huge", "giant", "gigantic"), 16
)
TIMM_EPSILON = 1e-6
# What tells that timm's model is another one than ours.
TIMM_OTHERS = {
    "dist_token": "a distillation token (DeiT)",
    "reg_token": "register tokens",
    "norm_pre.weight": "a norm before the layers (CLIP)",
    "fc_norm.weight": "a norm behind the mean of all tokens",
    "attn_pool.latent": "attention pooling",
    "blocks.0.ls1.gamma": "layer scale",
    "blocks.0.attn.q_norm.weight": "QK norms",
    "patch_embed.backbone.stem.conv.weight": "a convolutional stem",
    "pre_logits.fc.weight": "a hidden layer in the head",
}


def check_args(args: Any) -> None:
    """Check that transformers' ViT computes what a ViTClassifier of ours does.

    Raises:
        ConversionError: It does not.
    """
    problems = without_counterpart(args, "ViT") + differing(args, REQUIRED, "ViT")
    if args.kv_channels * args.num_attention_heads != args.hidden_size:
        problems.append(
            f"--kv-channels {args.kv_channels}: ViT's heads are --hidden-size / "
            "--num-attention-heads wide"
        )
    if problems:
        raise ConversionError("this model cannot be exported: " + "; ".join(problems))


def config_of(args: Any) -> Any:
    """Return the configuration of the Hugging Face model."""
    from transformers import ViTConfig

    square = args.img_h == args.img_w
    return ViTConfig(
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        intermediate_size=args.ffn_hidden_size,
        hidden_act="gelu" if activation_of(args) == "gelu" else "gelu_pytorch_tanh",
        hidden_dropout_prob=args.hidden_dropout,
        attention_probs_dropout_prob=args.attention_dropout,
        initializer_range=args.init_method_std,
        layer_norm_eps=args.layernorm_epsilon,
        image_size=args.img_h if square else [args.img_h, args.img_w],
        patch_size=args.patch_dim,
        num_channels=args.num_channels,
        num_labels=args.num_classes,
    )


def preprocessor_of(args: Any) -> dict[str, Any]:
    """Return a preprocessor_config.json that does what `finetune_vit` does in validation.

    Transformers' CLIPImageProcessor is the one that scales the shorter side and crops the middle.
    """
    resize = args.image_resize or max(args.img_h, args.img_w)
    means, stds = (
        list(values) * (args.num_channels if len(values) == 1 else 1)
        for values in (args.image_mean, args.image_std)
    )
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": args.num_channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": resize},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": args.img_h, "width": args.img_w},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": means,
        "image_std": stds,
    }


def save(config: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """Write the model under the names that every release of transformers reads.

    The modules of transformers 5 have other names than its files.
    """
    from safetensors.torch import save_file
    from transformers import ViTForImageClassification

    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    weights.clear()
    _, report = ViTForImageClassification.from_pretrained(folder, output_loading_info=True)
    wrong = {key: names for key, names in report.items() if names}
    assert not wrong, wrong


def timm_config(folder: Path, stored: dict[str, Callable[[], Tensor]]) -> Any:
    """Return the configuration of a model of timm's, as transformers' ViT has it.

    Args:
        folder: With timm's config.json.
        stored: What reads each of its tensors.

    Raises:
        ConversionError: It is another kind of model.
    """
    from transformers import ViTConfig

    given = json.loads((folder / "config.json").read_text())
    name, options = given["architecture"], given.get("model_args") or {}
    found = [text for tensor, text in TIMM_OTHERS.items() if tensor in stored]
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    lacking = [tensor for tensor in (*needed, "blocks.0.attn.qkv.bias") if tensor not in stored]
    if given.get("global_pool", "token") != "token":
        found.append(f"global_pool {given['global_pool']}")
    if found or lacking:
        listed = [f"has {text}" for text in found] + [f"lacks {tensor}" for tensor in lacking]
        raise ConversionError(
            f"--input {folder}: {name} {', '.join(listed)}; only timm's plain ViT with a class "
            "token is imported"
        )
    size = re.search("|".join(sorted(TIMM_HEADS, key=len, reverse=True)), name)
    heads = options.get("num_heads") or (size and TIMM_HEADS[size[0]])
    if not heads:
        raise ConversionError(
            f"--input {folder}: how many heads {name} has is not known; write it into config.json "
            'as "model_args": {"num_heads": N}'
        )
    image = options.get("img_size") or given.get("pretrained_cfg", {}).get(
        "input_size", [3, 224, 224]
    )
    patches = stored["patch_embed.proj.weight"]()
    return ViTConfig(
        hidden_size=patches.shape[0],
        num_hidden_layers=len({n.split(".")[1] for n in stored if n.startswith("blocks.")}),
        num_attention_heads=heads,
        intermediate_size=stored["blocks.0.mlp.fc1.weight"]().shape[0],
        layer_norm_eps=TIMM_EPSILON,
        image_size=image[-2:] if isinstance(image, list) else image,
        patch_size=patches.shape[-1],
        num_channels=patches.shape[1],
    )


def check_config(config: Any, folder: Path, positions: int) -> None:
    """Check that a ViT of transformers' is one that Megatron can hold.

    Args:
        positions: In the folder's tensor of position embeddings.

    Raises:
        ConversionError: Our classifier would compute something else.
    """
    problems = wrong_settings(config, {"hidden_act": EXACT_GELUS, "qkv_bias": (True,)})
    if not isinstance(config.patch_size, int):
        problems.append(f"patch_size {config.patch_size} (can be one number)")
    elif positions != (tokens := tokens_of(config)):
        height, width = image_of(config)
        problems.append(
            f"{positions} position embeddings, but an image of {height} x {width} has "
            f"{tokens - 1} patches of {config.patch_size} and a class token, {tokens} in all"
        )
    if problems:
        raise ConversionError(f"--input {folder} cannot be imported: " + "; ".join(problems))


def image_of(config: Any) -> tuple[int, int]:
    """Return the height and width of an image in pixels."""
    size = config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def tokens_of(config: Any) -> int:
    """Return the patches of an image, and the class token."""
    height, width = image_of(config)
    return (height // config.patch_size) * (width // config.patch_size) + 1


def normalization_of(folder: Path) -> dict[str, list[float]]:
    """Return {flag: values} of the mean and standard deviation of the pixels, if they are known."""
    file = folder / "preprocessor_config.json"
    given = json.loads(file.read_text()) if file.is_file() else {}
    timm = json.loads((folder / "config.json").read_text()).get("pretrained_cfg", {})
    found = {}
    for name in ("mean", "std"):
        values = given.get(f"image_{name}", timm.get(name))
        if values is not None:
            found[f"--image-{name}"] = values[:1] if len(set(values)) == 1 else values
    return found


def shape_of_config(config: Any, head: bool) -> Shape:
    """Return the layout of the parameters of a ViT, with or without its head."""
    heads = config.num_attention_heads
    return Shape(config.num_hidden_layers, heads, heads, 0, tied=False, head=head)


def flags_of(config: Any, classes: int, folder: Path) -> list[str]:
    """Return the flags of `finetune_vit` for a model.

    Args:
        classes: Of the training to come.
        folder: The model's.
    """
    height, width = image_of(config)
    flags: dict[str, Any] = {
        "--num-layers": config.num_hidden_layers,
        "--hidden-size": config.hidden_size,
        "--num-attention-heads": config.num_attention_heads,
        "--ffn-hidden-size": config.intermediate_size,
        "--attention-dropout": config.attention_probs_dropout_prob,
        "--hidden-dropout": config.hidden_dropout_prob,
        "--norm-epsilon": config.layer_norm_eps,
        "--num-classes": classes,
        "--img-h": height,
        "--img-w": width,
        "--patch-dim": config.patch_size,
        "--num-channels": config.num_channels,
        **normalization_of(folder),
    }
    listed = {flag: v if isinstance(v, list) else [v] for flag, v in flags.items()}
    return [str(part) for flag, values in listed.items() for part in (flag, *values)]
