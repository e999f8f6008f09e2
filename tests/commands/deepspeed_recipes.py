"""DeepSpeed's published random-LTD recipes, with the flags they become, and its formula."""

import argparse
import copy
import math
import shlex

from megatron_rltd.commands.convert_deepspeed import command as convert_deepspeed
from megatron_rltd.commands.convert_deepspeed.launch import Launch, parse_words
from megatron_rltd.training.arguments import add_arguments, config_from_args


def deepspeed(layers, low, high, steps, increment, batch, order="seq_batch_dim", **ltd):
    """Return a DeepSpeed configuration of a model of `layers`, all but first and last dropping."""
    return {
        "train_batch_size": batch,
        "data_efficiency": {
            "enabled": True,
            "data_routing": {
                "enabled": True,
                "random_ltd": {
                    "enabled": True,
                    "total_layer_num": layers,
                    "random_ltd_layer_num": layers - 2,
                    "random_ltd_layer_id": list(range(1, layers - 1)),
                    "model_mask_name": "attention_mask",
                    "model_type": "decoder",
                    "hidden_state_order": order,
                    "random_ltd_schedule": {
                        "min_value": low,
                        "max_value": high,
                        "schedule_type": "fixed_linear",
                        "schedule_config": {"require_steps": steps, "seq_per_step": increment},
                    },
                    **ltd,
                },
            },
            "data_sampling": {"enabled": False},
        },
    }


def gpt3(billions, ramp):
    """Return configuration and launch line of GPT-3 1.3B for a budget."""
    return deepspeed(24, 128, 2048, ramp, 16, 512), (
        "deepspeed pretrain_gpt.py --override-opt_param-scheduler --adam-beta2 0.95 "
        f"--lr-decay-tokens {billions}000000000 --lr-warmup-tokens 3000000000 "
        "--micro-batch-size 8 --global-batch-size 512 --num-layers 24 --hidden-size 2048 "
        "--num-attention-heads 16 --seq-length 2048 --max-position-embeddings 2048 "
        f"--train-tokens {billions}000000000 --train-samples 292968750 --lr 2.0e-4 --min-lr 1e-6 "
        "--lr-decay-style cosine --split 949,50,1 --fp16 --hysteresis 2 --checkpoint-activations "
        "--random-ltd --data-path my-gpt2_text_document --data-impl mmap --deepspeed "
        "--deepspeed_config ds_config.json --zero-stage 1 --pipeline-model-parallel-size 1 "
        "--no-pipeline-parallel --deepspeed-activation-checkpointing"
    )


def bert(millions):
    """Return configuration and launch line of BERT-large: the ramp is the nominal run."""
    steps = int(millions * 1_000_000)
    tokens = steps * 512 * 1024
    config = deepspeed(24, 128, 512, steps, 16, 1024, model_type="encoder")
    return config, (
        f"--lr-decay-tokens {tokens} --lr-warmup-iters 10000 --global-batch-size 1024 "
        f"--num-layers 24 --seq-length 512 --train-tokens {tokens} --train-iters 4000000 "
        "--lr-decay-style linear --hidden-dropout 0.1 --random-ltd --zero-stage 0"
    )


def random_ltd(low, ramp, increment):
    return (
        f"--random-ltd --random-ltd-min-tokens {low} --random-ltd-ramp-iters {ramp} "
        f"--random-ltd-increment {increment} "
    )


GPT2 = deepspeed(12, 128, 1024, 400, 8, 4, "batch_seq_dim")
GPT2_MEDIUM = deepspeed(24, 128, 1024, 400, 8, 4, "batch_seq_dim")
VIT = deepspeed(12, 32, 197, 3910, 8, 32, "batch_seq_dim", model_mask_name=None)
# {name: (configuration, launch line, flags)}
RECIPES = {
    "GPT-3 1.3B, 300B tokens": (
        *gpt3(300, 200_000),
        random_ltd(128, 200_000, 16) + "--train-layer-tokens 300000000000 --layer-token-lr "
        "--lr-warmup-samples 1464844 --lr-decay-samples 146484375 "
        "--global-batch-size 512 --seq-length 2048",
    ),
    "GPT-3 1.3B, 200B tokens": (
        *gpt3(200, 133_333),
        random_ltd(128, 133_333, 16) + "--train-layer-tokens 200000000000 --layer-token-lr "
        "--lr-warmup-samples 1464844 --lr-decay-samples 97656250 "
        "--global-batch-size 512 --seq-length 2048",
    ),
    "GPT-3 1.3B, 150B tokens": (
        *gpt3(150, 100_000),
        random_ltd(128, 100_000, 16) + "--train-layer-tokens 150000000000 --layer-token-lr "
        "--lr-warmup-samples 1464844 --lr-decay-samples 73242188 "
        "--global-batch-size 512 --seq-length 2048",
    ),
    # In the 10,000 iterations of warm-up, 22 of 24 layers keep 128 of 512 tokens: 5/16 of them all.
    "BERT-large, 1049B tokens": (
        *bert(2),
        random_ltd(128, 2_000_000, 16) + "--train-layer-tokens 1048576000000 --layer-token-lr "
        "--lr-warmup-samples 3200000 --lr-decay-samples 2048000000 "
        "--global-batch-size 1024 --seq-length 512",
    ),
    "BERT-large, 703B tokens": (
        *bert(1.34),
        random_ltd(128, 1_340_000, 16) + "--train-layer-tokens 702545920000 --layer-token-lr "
        "--lr-warmup-samples 3200000 --lr-decay-samples 1372160000 "
        "--global-batch-size 1024 --seq-length 512",
    ),
    "BERT-large, 524B tokens": (
        *bert(1),
        random_ltd(128, 1_000_000, 16) + "--train-layer-tokens 524288000000 --layer-token-lr "
        "--lr-warmup-samples 3200000 --lr-decay-samples 1024000000 "
        "--global-batch-size 1024 --seq-length 512",
    ),
    "GPT-2 124M": (GPT2, "", random_ltd(128, 400, 8) + "--global-batch-size 4 --seq-length 1024"),
    "GPT-2 350M": (
        GPT2_MEDIUM,
        "",
        random_ltd(128, 400, 8) + "--global-batch-size 4 --seq-length 1024",
    ),
    "GPT-2 350M, composed with a curriculum": (
        deepspeed(24, 128, 1024, 393, 8, 4, "batch_seq_dim"),
        "",
        random_ltd(128, 393, 8) + "--global-batch-size 4 --seq-length 1024",
    ),
    "ViT, CIFAR-10": (VIT, "", random_ltd(32, 3910, 8) + "--global-batch-size 32 --seq-length 197"),
    "ViT, ImageNet": (
        deepspeed(12, 32, 197, 3910, 8, 256, "batch_seq_dim", model_mask_name=None),
        "",
        random_ltd(32, 3910, 8) + "--global-batch-size 256 --seq-length 197",
    ),
}

GPT3 = RECIPES["GPT-3 1.3B, 300B tokens"][0]
FULL = "--random-ltd --seq-length 2048 --num-layers 24 --global-batch-size 512 "


def convert(config, line="", **options):
    """Return the conversion of a configuration and a launch line."""
    launch = parse_words(shlex.split(line)) if line else Launch()
    return convert_deepspeed.convert(copy.deepcopy(config), launch, **options)


def parse(flags):
    """Return our options in the words of a command line, and the words that are not ours."""
    parser = add_arguments(argparse.ArgumentParser(allow_abbrev=False))
    args, rest = parser.parse_known_args(flags)
    return config_from_args(args) if args.random_ltd else None, rest


def changed(config, path, value):
    """Return a copy of a configuration with another value at a dotted path below random_ltd."""
    config = copy.deepcopy(config)
    *parents, last = ["data_efficiency", "data_routing", "random_ltd", *path.split(".")]
    place = config
    for name in parents:
        place = place.setdefault(name, {})
    if value is KeyError:
        del place[last]
    else:
        place[last] = value
    return config


def deepspeed_lengths(config, steps):
    """Yield DeepSpeed's kept length of each step, in its own floating-point numbers."""
    schedule = config["data_efficiency"]["data_routing"]["random_ltd"]["random_ltd_schedule"]
    low, high = schedule["min_value"], schedule["max_value"]
    ramp, increment = (schedule["schedule_config"][n] for n in ("require_steps", "seq_per_step"))
    for step in range(steps):
        length = math.floor(float(step) / ramp * (high - low) + low)
        yield min(length - length % increment, high)


def deepspeed_iterations(config, layers, budget, batch, micro_batches=1):
    """Return micro-batches and tokens of a run that counts the layers' mean length, floored."""
    high = config["data_efficiency"]["data_routing"]["random_ltd"]["random_ltd_schedule"][
        "max_value"
    ]
    count = tokens = 0
    for length in deepspeed_lengths(config, 10**9):
        for _ in range(micro_batches):
            tokens += batch * ((high * 2 + length * (layers - 2)) // layers)
            count += 1
            if tokens >= budget:
                return count, tokens
    raise AssertionError
