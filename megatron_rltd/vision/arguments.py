"""The flags of `finetune_vit`, next to Megatron's own for images."""

import argparse
from typing import Any

from megatron_rltd.refusals import find_refused_vision_layout

# What the ViT is not made of. A flag that does nothing would mislead.
NOT_IN_A_VIT = ("num_experts", "mtp_num_layers", "spec", "multi_latent_attention", "mock_data")


def add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags; usable as Megatron's ``extra_args_provider``."""
    group = parser.add_argument_group("images")
    group.add_argument(
        "--image-resize",
        type=int,
        metavar="N",
        help="Scale the shorter side of each image to N pixels, before the crop to --img-h and "
        "--img-w. By default, the longer one of these two.",
    )
    group.add_argument(
        "--image-padding",
        type=int,
        default=0,
        metavar="N",
        help="In training, add a black border of N pixels before the random crop.",
    )
    group.add_argument(
        "--no-image-flip",
        action="store_false",
        dest="image_flip",
        help="In training, do not mirror every second image (at random), as for digits.",
    )
    for name in ("mean", "std"):
        group.add_argument(
            f"--image-{name}",
            type=float,
            nargs="+",
            default=[0.5],
            metavar="X",
            help=f"The {name} of the pixels from 0 to 1: one number, or one for each channel.",
        )
    group.add_argument(
        "--fresh-head",
        action="store_true",
        help="With --finetune or --pretrained-checkpoint, start with a new head even if the "
        "weights have one of as many classes.",
    )
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags, and change the defaults of Megatron's that do not suit a ViT."""
    add_flags(parser)
    # None: evaluate the whole set. Megatron's fused GELU is an approximation; a ViT has the exact.
    parser.set_defaults(eval_iters=None, bias_gelu_fusion=False)
    return parser


def tokens_of_image(args: Any) -> int:
    """Return s: the patches of an image, and the class token."""
    return (args.img_h // args.patch_dim) * (args.img_w // args.patch_dim) + 1


def defaults(args: Any) -> dict[str, Any]:
    """Return Megatron's ``args_defaults`` for parsed arguments: what the images decide."""
    tokens = tokens_of_image(args)
    return {
        "seq_length": tokens,
        "max_position_embeddings": tokens,
        # Megatron wants a tokenizer and a split of the data also where nothing reads them.
        "tokenizer_type": "NullTokenizer",
        "vocab_size": args.num_classes,
        "split": "1,0,0",
        "eval_iters": 1,  # until the size of the validation set is known
    }


def find_problems(args: Any) -> list[str]:
    """Return a sentence for each problem of parsed arguments, before Megatron validates them."""
    problems = [
        f"--{name.replace('_', '-')} does not work with finetune_vit, whose model is a plain ViT "
        "on images: omit it"
        for name in NOT_IN_A_VIT
        if getattr(args, name, None)
    ]
    problems += find_refused_vision_layout(args)
    for name, only in (
        ("position_embedding_type", "learned_absolute"),
        ("dataloader_type", "single"),
    ):
        value = getattr(args, name)
        if value not in (None, only):
            problems.append(
                f"--{name.replace('_', '-')} {value} does not work with finetune_vit: omit it"
            )
    sizes = [f"--{n.replace('_', '-')} {getattr(args, n)}" for n in ("img_h", "img_w", "patch_dim")]
    if min(args.img_h, args.img_w, args.patch_dim) <= 0:
        return [*problems, f"{', '.join(sizes)}: all must be positive"]
    uneven = [size for size in sizes[:2] if int(size.split()[1]) % args.patch_dim]
    if uneven:
        return [*problems, f"{' and '.join(uneven)} must be a multiple of {sizes[2]}"]
    tokens = tokens_of_image(args)
    if args.seq_length not in (None, tokens):
        problems.append(
            f"--seq-length {args.seq_length}, but {', '.join(sizes)} give {tokens - 1} patches and "
            f"a class token, {tokens} in all: omit --seq-length or give {tokens}"
        )
    if args.num_channels not in (1, 3):
        problems.append(f"--num-channels {args.num_channels} must be 1 (gray) or 3 (RGB)")
    for name in ("image_mean", "image_std"):
        values = getattr(args, name)
        if len(values) not in (1, args.num_channels) or name.endswith("std") and min(values) <= 0:
            problems.append(
                f"--{name.replace('_', '-')} {' '.join(map(str, values))} must be one number or "
                f"one for each of --num-channels {args.num_channels}"
                + (", all above 0" if name.endswith("std") else "")
            )
    if args.image_resize is not None and args.image_resize < max(args.img_h, args.img_w):
        problems.append(
            f"--image-resize {args.image_resize} is smaller than the crop to {sizes[0]} and "
            f"{sizes[1]}"
        )
    if args.image_padding < 0:
        problems.append(f"--image-padding {args.image_padding} must not be negative")
    return problems
