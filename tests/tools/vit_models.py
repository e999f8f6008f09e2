"""Small ViTs of transformers and in timm's format, and what our classifier makes of them."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from tests.tools.hf_models import scattered

CLASSES, HEIGHT, WIDTH, PATCH = 5, 12, 8, 4
IMAGES = np.random.default_rng(5).normal(size=(3, 3, HEIGHT, WIDTH))
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def vit(kind="ViTForImageClassification", **options):
    import transformers

    given = {"intermediate_size": 80, "image_size": [HEIGHT, WIDTH], "patch_size": PATCH}
    given |= {"num_labels": CLASSES, "attn_implementation": "eager"}
    config = transformers.ViTConfig(**{**SIZES, **given, **options})
    return scattered(getattr(transformers, kind)(config))


def timm(folder: Path, drop=(), more=None, **config) -> dict[str, torch.Tensor]:
    """Write a random VisionTransformer as timm uploads it; return its parameters."""
    generator = torch.Generator().manual_seed(7)
    width, wide, layers = 48, 80, 2

    def random(*shape):
        return torch.randn(shape, generator=generator) / 5

    weights = {
        "cls_token": random(1, 1, width),
        "pos_embed": random(1, 7, width),
        "patch_embed.proj.weight": random(width, 3, PATCH, PATCH),
        "patch_embed.proj.bias": random(width),
        "norm.weight": 1 + random(width),
        "norm.bias": random(width),
        "head.weight": random(CLASSES, width),
        "head.bias": random(CLASSES),
    }
    sizes = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (wide, width),
        "mlp.fc2": (width, wide),
        "norm1": (width,),
        "norm2": (width,),
    }
    for i in range(layers):
        for name, shape in sizes.items():
            weights[f"blocks.{i}.{name}.weight"] = random(*shape) + float(len(shape) == 1)
            weights[f"blocks.{i}.{name}.bias"] = random(shape[0])
    weights = {name: tensor for name, tensor in weights.items() if name not in drop} | (more or {})
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    given = {
        "architecture": "vit_tiny_patch16_224",  # three heads
        "num_classes": CLASSES,
        "global_pool": "token",
        "model_args": {"img_size": [HEIGHT, WIDTH]},
        "pretrained_cfg": {"input_size": [3, 224, 224], "mean": [0.4, 0.5, 0.6], "std": [0.5] * 3},
    }
    (folder / "config.json").write_text(json.dumps(given | config))
    return weights


def timm_logits(weights: dict[str, torch.Tensor]) -> np.ndarray:
    """Return the logits of `IMAGES` [b, classes] in float64, as timm's VisionTransformer does."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    functional, heads = torch.nn.functional, 3

    def norm(x, name):
        return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    patches = [w[f"patch_embed.proj.{name}"] for name in ("weight", "bias")]
    x = functional.conv2d(torch.from_numpy(IMAGES), *patches, stride=PATCH)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + w["pos_embed"]
    for i in range(2):
        qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v
        x = x + linear(mixed.transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        wide = functional.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + linear(wide, f"blocks.{i}.mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head").numpy()


def hugging_face_logits(folder: Path) -> np.ndarray:
    """Return the logits of `IMAGES` [b, classes], in float64 but for transformers' softmax."""
    from transformers import ViTForImageClassification

    model = ViTForImageClassification.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        return model.eval().double()(torch.from_numpy(IMAGES)).logits.numpy()


def megatron_logits(flags: list[str], output: str, load: str = "", save: str = "") -> None:
    """Be a rank of `finetune_vit` up to its model; write the logits of `IMAGES`, in float64.

    Args:
        flags: Of the model.
        output: An .npy of [b, classes].
        load: A checkpoint; without, the model is random.
        save: Where to save one.
    """
    from megatron_rltd.cpu import adapter

    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    torch.set_num_threads(1)
    adapter.enable()
    from megatron.core import mpu, tensor_parallel
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training import arguments, checkpointing, global_vars

    from megatron_rltd.pretrain.finetune_vit import model_provider
    from megatron_rltd.vision.arguments import add_arguments, defaults, find_problems

    sys.argv = ["finetune_vit.py", "--micro-batch-size", "1", "--data-path", "none", *flags]
    sys.argv += ["--load", load, "--finetune"] if load else []
    sys.argv += ["--save", save, "--save-interval", "1"] if save else []
    args = arguments.parse_args(add_arguments)
    assert find_problems(args) == []
    if args.use_checkpoint_args:
        args, _ = checkpointing.load_args_from_checkpoint(args)
    arguments.validate_args(args, defaults(args))
    global_vars.set_args(args)
    torch.distributed.init_process_group("gloo")
    mpu.initialize_model_parallel(args.tensor_model_parallel_size)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model = model_provider()
    if load:
        checkpointing.load_checkpoint([model], None, None)
    else:
        scattered(model)
    if save:
        filesystem_async.get_write_results_queue("fork")  # which would else import torch again
        checkpointing.save_checkpoint(1, [model], None, None, 0)
    with torch.no_grad():
        logits = model.eval().double()(torch.from_numpy(IMAGES))
    if torch.distributed.get_rank() == 0:
        np.save(output, logits.numpy())
