"""Fine-tune a ViT on labelled images, or train one, with Megatron's arguments and training loop.

    python -m megatron_rltd finetune_vit --num-layers 12 ... --data-path FOLDER --num-classes 10
    torchrun --nproc-per-node 8 -m megatron_rltd finetune_vit ...

The model is `megatron_rltd.vision.classifier.ViTClassifier`, the images are those of
`megatron_rltd.vision.images.find_images`. ``--finetune --load FOLDER`` and
``--pretrained-checkpoint FOLDER`` begin with the weights of a checkpoint; if it has other classes,
the head is fresh.

Shapes: b micro batch, c channels, h height, w width.
"""

import functools
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain, print_rank_0
from megatron.training.arguments import core_transformer_config_from_args, parse_args

from megatron_rltd.config import ConfigError, RankConfigError
from megatron_rltd.patching import versions
from megatron_rltd.pretrain import sgd_momentum
from megatron_rltd.vision.arguments import add_arguments, defaults, find_problems
from megatron_rltd.vision.classifier import ViTClassifier, choose_head, layer_spec
from megatron_rltd.vision.datasets import ImageReader, TrainingSamples, ValidationSamples
from megatron_rltd.vision.images import find_images
from megatron_rltd.vision.transforms import Transform

RELEASE = versions.release()


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> ViTClassifier:
    """Build the model that Megatron's arguments ask for.

    Raises:
        ConfigError: The checkpoint to be loaded does not fit them.
    """
    args = get_args()
    config = config or core_transformer_config_from_args(args)
    model = ViTClassifier(
        config,
        layer_spec(config.transformer_impl == "transformer_engine"),
        num_classes=args.num_classes,
        img_h=args.img_h,
        img_w=args.img_w,
        patch_dim=args.patch_dim,
        num_channels=args.num_channels,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )
    said = choose_head(model, args)
    if said:
        print_rank_0(f"finetune_vit: {said}")
    return model


def get_batch(data_iterator: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the next micro-batch on this rank's device.

    Returns:
        images [b, c, h, w] float32, normalized; labels and weights [b] int64.
    """
    args = get_args()
    data = None if data_iterator is None else next(data_iterator)
    images = tensor_parallel.broadcast_data(["image"], data, torch.uint8)["image"]
    rest = tensor_parallel.broadcast_data(["label", "weight"], data, torch.int64)
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=images.device).view(-1, 1, 1)
        for values in (args.image_mean, args.image_std)
    )
    return (images.float() / 255 - mean) / std, rest["label"], rest["weight"]


def loss_func(labels: torch.Tensor, weights: torch.Tensor, logits: torch.Tensor) -> tuple:
    """Return the summed loss of a micro-batch, its images, and what to report.

    Args:
        labels, weights: [b].
        logits: [b, classes].
    """
    losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    right = (logits.argmax(dim=1) == labels) * weights
    images, loss = weights.sum(), (losses * weights).sum()
    # Megatron's own name of the loss: its tools, and `compare`, look for it.
    sums = {"lm loss": loss.detach(), "accuracy": right.sum().float()}
    return loss, images.int(), {k: torch.stack([v, images.float()]) for k, v in sums.items()}


def forward_step(data_iterator: Any, model: torch.nn.Module) -> tuple:
    """Run the model on the next micro-batch; return its logits and the function of their loss."""
    images, labels, weights = get_batch(data_iterator)
    return model(images), functools.partial(loss_func, labels, weights)


def transform_of(args: Any) -> Transform:
    """Return what Megatron's arguments say is done with each image."""
    return Transform(
        height=args.img_h,
        width=args.img_w,
        channels=args.num_channels,
        resize=args.image_resize or max(args.img_h, args.img_w),
        padding=args.image_padding,
        flip=args.image_flip,
    )


def read_images(args: Any) -> tuple[ImageReader, ImageReader]:
    """Return readers of the training and the validation set.

    Raises:
        ConfigError: The arguments do not say where they are.
        RankConfigError: There are none, or they do not fit the arguments.
    """
    if not args.data_path or len(args.data_path) != 1:
        raise ConfigError(["give the folder of the images: --data-path FOLDER"])
    train, validation = find_images(args.data_path[0])
    if len(train.classes) != args.num_classes:
        raise RankConfigError(
            [
                f"--num-classes {args.num_classes}, but --data-path {args.data_path[0]} has "
                f"{len(train.classes)} classes: give --num-classes {len(train.classes)}"
            ]
        )
    readers = ImageReader(train), ImageReader(validation)
    for reader in readers:
        reader.check(transform_of(args))
    return readers


def datasets_provider(
    readers: tuple[ImageReader, ImageReader],
    evaluates_all: bool,
    num_samples: list[int],
    vp_stage: int | None = None,
) -> tuple:
    """Return the samples for training and validation, and None for a test set.

    Args:
        readers: Of the training and the validation set.
        evaluates_all: Whether an evaluation takes the whole set, not ``--eval-iters`` batches.
        num_samples: Of training, as Megatron counted; the others are not used.
    """
    from megatron.core import mpu

    args = get_args()
    batch = getattr(args, "eval_global_batch_size", None) or args.global_batch_size
    if evaluates_all:
        args.eval_iters = -(-len(readers[1]) // batch)
    whole = -(-len(readers[1]) // batch) * batch
    print_rank_0(
        f"finetune_vit: {len(readers[0]):,} images of {args.num_classes:,} classes, and "
        f"{len(readers[1]):,} for validation; an evaluation takes "
        f"{min(len(readers[1]), args.eval_iters * batch):,} of these"
    )
    if mpu.get_tensor_model_parallel_rank() != 0:
        return None, None, None
    transform = transform_of(args)
    return (
        TrainingSamples(readers[0], transform, args.seed, num_samples[0]),
        ValidationSamples(readers[1], transform, whole),
        None,
    )


def main() -> None:
    """Parse Megatron's arguments, find the images and train. Megatron's releases differ here.

    Raises:
        ConfigError: Some flags do not go together.
        RankConfigError: There is something wrong with the images.
    """
    args = parse_args(add_arguments)
    problems = find_problems(args)
    if problems:
        raise ConfigError(problems)
    if args.optimizer == "sgd":
        sgd_momentum.use()
    provider = functools.partial(datasets_provider, read_images(args), args.eval_iters is None)
    provider.is_distributed = True  # type: ignore[attr-defined]  # call it on every rank
    model_type, settings = ModelType.encoder_or_decoder, defaults(args)
    if RELEASE < (0, 18):
        pretrain(
            provider,
            model_provider,
            model_type,
            forward_step,
            extra_args_provider=add_arguments,
            args_defaults=settings,
        )
        return

    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(add_arguments, args_defaults=settings)
    config = pretrain_cfg_container_from_args(args)
    if RELEASE < (0, 19):
        pretrain(config, provider, model_provider, model_type, forward_step)
    else:
        pretrain(config, provider, model_type, forward_step, model_provider=model_provider)


if __name__ == "__main__":
    main()
