"""Pretrain a GPT with Megatron's own arguments, datasets, model builder and training loop.

It is for people without a checkout of Megatron-LM, whose pretrain_gpt.py does the same and more.
Megatron's releases differ in how to call them: see `main`.

    python -m megatron_rltd pretrain_gpt --num-layers 8 ... --data-path PREFIX
    torchrun --nproc-per-node 8 -m megatron_rltd pretrain_gpt ...

Shapes: b micro batch, s sequence length, c context-parallel size.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu, tensor_parallel
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from megatron.training import get_args, pretrain, print_rank_0
from megatron.training.utils import (
    get_blend_and_blend_per_split,
    is_first_or_last_pipeline_stage,
)

from megatron_rltd.config import ConfigError, RankConfigError
from megatron_rltd.patching import versions

RELEASE = versions.release()
# With these flags, Megatron-LM's script reads other data than this one.
OTHER_DATA = (
    "--sft",
    "--dataloader-inter-document-masking",
    "--fim-data",
    "--hybrid-context-parallel",
)


def get_batch(data_iterator: Any, vp_stage: int | None) -> dict[str, Any]:
    """Return this rank's part of the next micro-batch.

    Returns:
        tokens, labels, position_ids [b, s/c] int64, loss_mask [b, s/c] float32, attention_mask
        [b, 1, s/c, s] bool or None; all None on middle pipeline stages.
    """
    args = get_args()
    keys = ("tokens", "labels", "position_ids", "loss_mask", "attention_mask")
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(keys)
    data = next(data_iterator) if mpu.get_tensor_model_parallel_rank() == 0 else None
    batch = tensor_parallel.broadcast_data(list(keys[:3]), data, torch.int64)
    batch |= tensor_parallel.broadcast_data(["loss_mask"], data, torch.float32)
    batch["attention_mask"] = None
    if args.create_attention_mask_in_dataloader:
        batch |= tensor_parallel.broadcast_data(["attention_mask"], data, torch.bool)
    # 0.18 made this function also the way to split samples unevenly, and asks whether it should.
    options = {} if RELEASE < (0, 18) else {"is_hybrid_cp": False}
    return get_batch_on_this_cp_rank(batch, cp_group=mpu.get_context_parallel_group(), **options)


def loss_func(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple:
    """Return the summed loss of a micro-batch, its tokens, and what to report.

    Args:
        loss_mask: [b, s/c].
        losses: [b, s/c], the loss of each token.
    """
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * mask)
    if get_args().check_for_nan_in_loss_and_grad:
        get_rerun_state_machine().validate_result(
            result=loss,
            rejection_func=lambda result: not torch.isfinite(result),
            message="found NaN or Inf in the forward loss",
            tolerance=0.0,
            fatal=True,
        )
    num_tokens = mask.sum().detach().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens])}


def forward_step(data_iterator: Any, model: torch.nn.Module) -> tuple:
    """Run the model on the next micro-batch; return its losses and the function to sum them."""
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    losses = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return losses, partial(loss_func, batch["loss_mask"])


def check_data_path(args: Any, megatrons: str = "pretrain_gpt.py") -> None:
    """Check that there is data for every set in use, of a kind that this script reads.

    Args:
        args: Megatron's arguments.
        megatrons: Megatron-LM's script that reads more kinds.

    Raises:
        ConfigError: This script does not read data of that kind.
        RankConfigError: A file is missing on this rank's machine, or a set would be empty.
    """
    other = [flag for flag in OTHER_DATA if getattr(args, flag[2:].replace("-", "_"), None)]
    if other:
        raise ConfigError(
            [
                f"{flag} does not work with this script: use the {megatrons} of Megatron-LM"
                for flag in other
            ]
        )
    if args.mock_data:
        return
    blend, per_split = get_blend_and_blend_per_split(args)
    prefixes = {prefix for b in (blend, *(per_split or [])) if b for prefix in b[0]}
    files = [Path(prefix + suffix) for prefix in sorted(prefixes) for suffix in (".bin", ".idx")]
    problems = [
        f"--data-path: {file} is {'empty' if file.is_file() else 'missing'}; "
        "tools/preprocess_data.py makes .bin and .idx files from text"
        for file in files
        if not file.is_file() or not file.stat().st_size
    ]
    if not prefixes:
        raise ConfigError(["there is no data: give --data-path PREFIX or --mock-data"])
    if blend and not problems:
        for prefix in blend[0]:
            problems += empty_sets(args.split or "969, 30, 1", prefix)  # Megatron's default
    if problems:
        raise RankConfigError(problems)


def empty_sets(split: str, prefix: str) -> list[str]:
    """Return a sentence for each set that gets no document of a data set.

    Megatron would search such a set for samples forever
    (``megatron/core/datasets/blended_megatron_dataset_builder.py``).
    """
    documents = len(IndexedDataset(prefix))
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    sets = zip(("training", "validation", "test"), matrix, strict=True)
    return [
        f"--split {split} gives {name} none of the {documents} documents of {prefix}: use a larger "
        "share, or 0 as in --split 90,10,0 or --split 100,0,0 --eval-iters 0"
        for name, share in sets
        if share and round(share[0] * documents) == round(share[1] * documents)
    ]


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple:
    """Build the training, validation and test sets of the given numbers of samples."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    dataset = MockGPTDataset if args.mock_data else GPTDataset
    print_rank_0("> building train, validation, and test datasets for GPT ...")
    return BlendedMegatronDatasetBuilder(
        dataset,
        num_samples,
        lambda: (
            mpu.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(vp_stage)
        ),
        config,
    ).build()


# Megatron reads this, and then calls the function on every rank.
datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def main() -> None:
    """Parse Megatron's arguments and train. Megatron's releases differ here."""
    defaults = {"tokenizer_type": "GPT2BPETokenizer"}
    model_type = ModelType.encoder_or_decoder
    if RELEASE < (0, 18):
        # pretrain parses and checks the arguments itself. We parse them only for our own check.
        from megatron.training.arguments import parse_args

        from megatron_rltd.pretrain.model_provider import model_provider

        check_data_path(parse_args())
        pretrain(
            datasets_provider, model_provider, model_type, forward_step, args_defaults=defaults
        )
        return

    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(args_defaults=defaults)
    check_data_path(args)
    if RELEASE < (0, 19):
        from megatron_rltd.pretrain.model_provider import model_provider

        config = pretrain_cfg_container_from_args(args)
        pretrain(config, datasets_provider, model_provider, model_type, forward_step)
    else:
        # Megatron builds the model, from the config.
        from megatron.training.argument_utils import gpt_config_from_args

        config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
        pretrain(config, datasets_provider, model_type, forward_step)


if __name__ == "__main__":
    main()
