"""import_hf.py and export_hf.py on ViTs of transformers and timm: logits, and bit-equal back."""

import argparse
import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from megatron_rltd.vision.transforms import Transform
from tests.parallel import run
from tests.tools.vit_models import (
    CLASSES,
    HEIGHT,
    IMAGES,
    PATCH,
    WIDTH,
    hugging_face_logits,
    megatron_logits,
    timm,
    timm_logits,
    vit,
)

import export_hf  # isort: skip  from tools, which tests.parallel puts on the path
import hf_checkpoint
import hf_names
import hf_vit
import import_hf
from hf_weights import ConversionError

# How far float64 may be apart: transformers' ViT takes the softmax in float32.
EXACT, SOFTMAX = 1e-12, 1e-6


def export(load, output, *options):
    arguments = ["--load", load, "--output", output, *options]
    assert export_hf.main([str(a) for a in arguments]) == 0
    return output


def import_(folder, output, capsys, *options):
    """Import; return the checkpoint and the flags that were printed, without --load."""
    arguments = ["--input", folder, "--output", output, *options]
    assert import_hf.main([str(a) for a in arguments]) == 0
    printed = capsys.readouterr().out
    assert "train it with finetune_vit and" in printed
    line = next(x for x in printed.splitlines() if x.startswith("  --load"))
    assert shlex.split(line)[:3] == ["--load", str(output), "--finetune"]
    return output, shlex.split(line)[3:], printed


def of_megatron(flags, tmp_path, load="", save="", world_size=1):
    output = tmp_path / "logits.npy"
    run(world_size, megatron_logits, flags, str(output), str(load), str(save))
    return np.load(output)


def assert_near(ours, theirs, tolerance, classes=CLASSES):
    assert ours.shape == theirs.shape == (len(IMAGES), classes)
    assert np.abs(theirs).max() > 0.1
    assert np.abs(ours - theirs).max() <= tolerance


def test_a_vit_of_transformers_there_and_back(tmp_path, capsys):
    model = vit(layer_norm_eps=1e-3)
    model.save_pretrained(tmp_path / "hf")
    load, flags, printed = import_(tmp_path / "hf", tmp_path / "megatron", capsys)
    assert f"the head is that of the model's {CLASSES} classes" in printed
    assert "--image-mean" not in flags  # the folder says nothing of it
    ours = of_megatron([*flags, "--tensor-model-parallel-size", "2"], tmp_path, load, "", 2)
    assert_near(ours, hugging_face_logits(tmp_path / "hf"), SOFTMAX)
    back = export(load, tmp_path / "back")
    assert "images: 12 x 8 in patches of 4, 5 classes" in capsys.readouterr().out
    before, after = (load_file(p / "model.safetensors") for p in (tmp_path / "hf", back))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((p / "config.json").read_text()) for p in (tmp_path / "hf", back)]
    assert configs[1].pop("torch_dtype") == configs[1]["dtype"]
    assert configs[0] == configs[1]


def test_use_checkpoint_args(tmp_path, capsys):
    vit().save_pretrained(tmp_path / "hf")
    load, _, printed = import_(tmp_path / "hf", tmp_path / "megatron", capsys)
    left = shlex.split(printed.split("all of these except ")[1].splitlines()[0])
    assert left[::2] == [
        f"--{name}"
        for name in "norm-epsilon num-classes img-h img-w patch-dim num-channels".split()
    ]
    ours = of_megatron([*left, "--use-checkpoint-args"], tmp_path, load)
    assert_near(ours, hugging_face_logits(tmp_path / "hf"), SOFTMAX)


def test_a_vit_of_timm(tmp_path, capsys):
    weights = timm(tmp_path / "timm")
    load, flags, _ = import_(tmp_path / "timm", tmp_path / "megatron", capsys)
    line = " ".join(flags)
    assert "--norm-epsilon 1e-06" in line
    assert "--num-attention-heads 3" in line
    assert "--image-mean 0.4 0.5 0.6 --image-std 0.5" in line
    ours = of_megatron(flags, tmp_path, load)
    assert_near(ours, timm_logits(weights), EXACT)
    back = export(load, tmp_path / "back")
    assert_near(hugging_face_logits(back), ours, SOFTMAX)
    # So that another order of the rows of QKV would be seen.
    swapped = weights | {"blocks.0.attn.qkv.weight": weights["blocks.0.attn.qkv.weight"].flip(0)}
    assert np.abs(timm_logits(swapped) - ours).max() > 1e-3


def test_a_run_of_finetune_vit_is_exported(tmp_path):
    flags = (
        "--num-layers 2 --hidden-size 48 --num-attention-heads 4 --num-classes 7 --img-h 12 "
        "--img-w 8 --patch-dim 4 --image-mean 0.1 0.2 0.3 --ckpt-format torch_dist "
        "--tensor-model-parallel-size 2 --hidden-dropout 0.25"
    ).split()
    theirs = of_megatron(flags, tmp_path, save=tmp_path / "run", world_size=2)
    folder = export(tmp_path / "run", tmp_path / "hf")
    assert_near(hugging_face_logits(folder), theirs, SOFTMAX, classes=7)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["ViTForImageClassification"]
    assert (config["hidden_act"], config["hidden_dropout_prob"]) == ("gelu", 0.25)
    images = json.loads((folder / "preprocessor_config.json").read_text())
    assert images["image_mean"] == [0.1, 0.2, 0.3]
    assert all(path.stat().st_mode & 0o44 == 0o44 for path in folder.iterdir())


def test_another_number_of_classes_leaves_the_head_out(tmp_path, capsys):
    vit().save_pretrained(tmp_path / "hf")
    load, flags, printed = import_(
        tmp_path / "hf", tmp_path / "megatron", capsys, "--num-classes", "7"
    )
    assert "the head is left out: finetune_vit makes one of 7 classes, by --seed" in printed
    assert flags[flags.index("--num-classes") + 1] == "7"
    with hf_checkpoint.alone():
        names = hf_checkpoint.tensor_shapes(hf_checkpoint.find(load, None))
    assert "final_layernorm.weight" in names
    assert "head.weight" not in names
    of_megatron(flags, tmp_path, load, save=tmp_path / "run")
    before = load_file(tmp_path / "hf" / "model.safetensors")
    after = load_file(export(tmp_path / "run", tmp_path / "back") / "model.safetensors")
    assert after["classifier.weight"].shape == (7, 48)
    assert after["classifier.weight"].std() > 0.01
    assert before.keys() == after.keys()
    body = before.keys() - {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(before[name], after[name]) for name in body)


def test_a_model_without_head(tmp_path, capsys):
    # As those that were trained on ImageNet-21k are published: bare names, and a pooler.
    vit("ViTModel").save_pretrained(tmp_path / "hf")
    assert "vit.pooler.dense.weight".partition(".")[2] in load_file(
        tmp_path / "hf" / "model.safetensors"
    )
    assert "has no head: give --num-classes N" in said_by_import(tmp_path / "hf", tmp_path, capsys)
    import_(tmp_path / "hf", tmp_path / "megatron", capsys, "--num-classes", "7")
    timm(tmp_path / "timm", drop=("head.weight", "head.bias"), num_classes=0)
    import_(tmp_path / "timm", tmp_path / "megatron-2", capsys, "--num-classes", "7")
    # An export needs a head.
    arguments = ["--load", str(tmp_path / "megatron"), "--output", str(tmp_path / "o")]
    assert export_hf.main(arguments) == 2
    assert "lacks head.bias" in capsys.readouterr().err


def said_by_import(folder, tmp_path, capsys, *options):
    """Return the one line that the import says before it gives up."""
    output = tmp_path / "refused"
    arguments = ["--input", str(folder), "--output", str(output), *options]
    assert import_hf.main(arguments) == 2
    assert not output.exists()
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "deit"}, "model_type deit: it has a distillation token beside the class"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act gelu_pytorch_tanh (can be gelu or"),
        ({"qkv_bias": False}, "qkv_bias False (can be True)"),
        ({"image_size": 16}, "7 position embeddings, but an image of 16 x 16 has 16 patches of 4"),
    ],
)
def test_models_of_transformers_that_are_refused(tmp_path, capsys, change, said):
    vit().save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert said in said_by_import(tmp_path / "hf", tmp_path, capsys)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"more": {"dist_token": torch.ones(1, 1, 48)}}, "has a distillation token (DeiT)"),
        ({"more": {"reg_token": torch.ones(1, 4, 48)}}, "has register tokens"),
        ({"more": {"blocks.0.ls1.gamma": torch.ones(48)}}, "has layer scale"),
        ({"more": {"fc_norm.weight": torch.ones(48)}}, "has a norm behind the mean of all tokens"),
        ({"drop": ("cls_token",), "global_pool": "avg"}, "has global_pool avg, lacks cls_token"),
        ({"drop": ("blocks.0.attn.qkv.bias",)}, "lacks blocks.0.attn.qkv.bias"),
        ({"architecture": "vit_wide_patch16_224"}, '"model_args": {"num_heads": N}'),
        ({"more": {"adapter": torch.ones(1)}}, "Megatron has no place for adapter"),
    ],
)
def test_models_of_timm_that_are_refused(tmp_path, capsys, options, said):
    timm(tmp_path / "timm", **options)
    line = said_by_import(tmp_path / "timm", tmp_path, capsys)
    assert said in line
    assert "--input" in line


def test_heads_of_timm(tmp_path):
    weights = timm(tmp_path / "timm", architecture="vit_gigantic_patch14_224")
    stored = {name: (lambda tensor=tensor: tensor) for name, tensor in weights.items()}

    def heads(**change):
        path = tmp_path / "timm" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        return hf_vit.timm_config(tmp_path / "timm", stored).num_attention_heads

    assert heads() == 16
    assert heads(architecture="vit_base_patch32_384") == 12
    assert heads(architecture="deit_small_patch16_224") == 6
    assert heads(model_args={"num_heads": 8}) == 8


def test_options_of_other_models_are_refused(tmp_path, capsys):
    vit().save_pretrained(tmp_path / "hf")
    said = said_by_import(tmp_path / "hf", tmp_path, capsys, "--seq-length", "7")
    assert "--seq-length of a ViT is its patches and the class token: omit it" in said
    from tests.tools.hf_models import gpt2

    gpt2().save_pretrained(tmp_path / "gpt2")
    said = said_by_import(tmp_path / "gpt2", tmp_path, capsys, "--num-classes", "7")
    assert "--num-classes is for a ViT: omit it" in said


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_prepared_as_in_validation(tmp_path, channels):
    from transformers import AutoImageProcessor

    args = argparse.Namespace(
        img_h=HEIGHT, img_w=WIDTH, patch_dim=PATCH, num_channels=channels, image_resize=16
    )
    args.image_mean, args.image_std = [0.4], [0.2, 0.3, 0.4][:channels]
    text = json.dumps(hf_vit.preprocessor_of(args))
    (tmp_path / "preprocessor_config.json").write_text(text)
    pixels = np.random.default_rng(1).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    ours = Transform(HEIGHT, WIDTH, channels, resize=16).for_validation(image) / 255
    ours = (ours - np.array(0.4)) / np.array(args.image_std)[:, None, None]
    image = image if channels == 3 else image.convert("L")
    theirs = AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="np")
    assert theirs["pixel_values"].shape == (1, channels, HEIGHT, WIDTH)
    assert np.abs(theirs["pixel_values"][0] - ours).max() < 1e-5


def stored(**changes):
    """Return arguments as a checkpoint of finetune_vit holds them."""
    plain = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "kv_channels": 8,
        "spec": None,
        "normalization": "LayerNorm",
        "swiglu": False,
        "add_bias_linear": True,
        "group_query_attention": False,
    }
    return argparse.Namespace(**plain | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"qk_layernorm": True}, "--qk-layernorm has no counterpart in Hugging Face's ViT"),
        ({"normalization": "RMSNorm"}, "--normalization RMSNorm: Hugging Face's ViT has LayerNorm"),
        ({"swiglu": True}, "--swiglu: "),
        ({"kv_channels": 16}, "--kv-channels 16: ViT's heads are"),
    ],
)
def test_what_does_not_map_is_refused_by_its_flag(changes, said):
    hf_vit.check_args(stored())
    with pytest.raises(ConversionError) as error:
        hf_vit.check_args(stored(**changes))
    assert said in str(error.value)


def test_the_family_is_that_of_the_names():
    assert hf_names.family_of(["decoder.layers.mlp.linear_fc1.weight", "conv1.weight"]) == "vit"


def test_a_damaged_folder_is_refused(tmp_path, capsys):
    vit().save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    weights = load_file(file)
    weights["vit.embeddings.mask_token"] = weights.pop("vit.layernorm.bias")
    save_file(weights, file)
    line = said_by_import(tmp_path / "hf", tmp_path, capsys)
    assert "there is no tensor vit.layernorm.bias" in line
    assert "no place for vit.embeddings.mask_token" in line
    (tmp_path / "hf" / "config.json").write_text("{")
    assert f"--input {tmp_path / 'hf'}: " in said_by_import(tmp_path / "hf", tmp_path, capsys)
