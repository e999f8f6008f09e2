"""Pretrain a BERT with Megatron's own arguments, data set, model and training loop.

It is for people without a checkout of Megatron-LM, and for machines without Transformer Engine,
where Megatron-LM's pretrain_bert.py does not start. It takes that script's flags.

    python -m megatron_rltd pretrain_bert --num-layers 24 ... --data-path PREFIX
    torchrun --nproc-per-node 8 -m megatron_rltd pretrain_bert ...

Shapes: b micro batch, s sequence length.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu, tensor_parallel
from megatron.core.datasets.bert_dataset import (
    BERTMaskedWordPieceDataset,
    BERTMaskedWordPieceDatasetConfig,
)
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from megatron.core.enums import ModelType
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.bert import bert_layer_specs
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import import_module
from megatron.training import get_args, pretrain, print_rank_0
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.utils import (
    average_losses_across_data_parallel_group,
    get_blend_and_blend_per_split,
)

from megatron_rltd.config import ConfigError, RankConfigError
from megatron_rltd.patching import versions
from megatron_rltd.refusals import BERT_WITH_CONTEXT_PARALLELISM
from megatron_rltd.training import bert_data

RELEASE = versions.release()


def layer_spec(args: Any) -> Any:
    """Return the layers that the arguments ask for.

    ``--spec local`` and ``--spec MODULE NAME`` mean what they mean in Megatron-LM's script. Without
    ``--spec``, they are Transformer Engine's, unless it is missing or ``--transformer-impl local``
    is given.
    """
    if args.spec is None and args.transformer_impl == "transformer_engine" and HAVE_TE:
        return bert_layer_specs.get_bert_layer_with_transformer_engine_spec()
    if args.spec is None or args.spec[0] == "local":
        return bert_layer_specs.bert_layer_local_spec
    return import_module(args.spec)


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> torch.nn.Module:
    """Build a pipeline stage of the model that Megatron's arguments ask for.

    Args:
        pre_process: Whether it is the first stage, with the embedding.
        post_process: Whether it is the last, with the losses.
    """
    args = get_args()
    print_rank_0("building BERT model ...")
    return BertModel(
        config or core_transformer_config_from_args(args),
        num_tokentypes=2 if args.bert_binary_head else 0,
        transformer_layer_spec=layer_spec(args),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        add_binary_head=args.bert_binary_head,
        vp_stage=vp_stage,
    )


def get_batch(data_iterator: Any) -> dict[str, torch.Tensor]:
    """Return the next micro-batch, the same on all tensor-parallel ranks.

    Returns:
        int64: text, types (0 or 1), labels (-1 where there is none), loss_mask, padding_mask (1:
        token) [b, s], is_random [b].
    """
    keys = ["text", "types", "labels", "is_random", "loss_mask", "padding_mask"]
    data = next(data_iterator) if mpu.get_tensor_model_parallel_rank() == 0 else None
    return tensor_parallel.broadcast_data(keys, data, torch.int64)


def loss_func(loss_mask: torch.Tensor, is_random: torch.Tensor, output: tuple) -> tuple:
    """Return the loss of a micro-batch and what to report.

    Args:
        loss_mask: [b, s], 1 where a token was masked.
        is_random: [b], 1 where the two segments are swapped.
        output: The loss of each token [b, s], and logits [b, 2] of the segments' order or None.
    """
    losses, logits = output
    mask = loss_mask.reshape(-1).float()
    loss = torch.sum(losses.float().view(-1) * mask) / mask.sum()
    parts = {"lm loss": loss}
    if logits is not None:
        parts["sop loss"] = torch.nn.functional.cross_entropy(
            logits.float().view(-1, 2), is_random.view(-1), ignore_index=-1
        )
        loss = loss + parts["sop loss"]
    averages = average_losses_across_data_parallel_group(list(parts.values()))
    return loss, dict(zip(parts, averages, strict=True))


def forward_step(data_iterator: Any, model: torch.nn.Module) -> tuple:
    """Run the model on the next micro-batch; return its output and the function of its loss."""
    batch = get_batch(data_iterator)
    output = model(
        batch["text"],
        batch["padding_mask"],
        tokentype_ids=batch["types"] if get_args().bert_binary_head else None,
        lm_labels=batch["labels"],
    )
    return output, partial(loss_func, batch["loss_mask"], batch["is_random"])


def check_args(args: Any) -> None:
    """Check what Megatron would not say, or not clearly, before it builds anything.

    Args:
        args: Megatron's arguments, as they are parsed.

    Raises:
        ConfigError: This script does not work with these flags.
        RankConfigError: A file is missing on this rank's machine.
    """
    problems = bert_data.vocabulary_problems(args)
    if args.context_parallel_size > 1:
        problems.append(BERT_WITH_CONTEXT_PARALLELISM)
    if args.mock_data:
        problems.append(
            "--mock-data: Megatron has no made-up data for BERT: give --data-path PREFIX"
        )
    backend = getattr(args, "attention_backend", AttnBackend.auto)
    if (
        layer_spec(args) is bert_layer_specs.bert_layer_local_spec
        and backend not in (AttnBackend.auto, AttnBackend.local)  # as BertModel asserts
    ):
        problems.append(
            f"--attention-backend {backend.name} is for Transformer Engine, whose layers are not "
            "used here: omit it"
        )
    blend, per_split = get_blend_and_blend_per_split(args)
    prefixes = {prefix for b in (blend, *(per_split or [])) if b for prefix in b[0]}
    if not prefixes and not args.mock_data:
        problems.append("there is no data: give --data-path PREFIX")
    if problems:
        raise ConfigError(problems)
    files = [Path(prefix + suffix) for prefix in sorted(prefixes) for suffix in (".bin", ".idx")]
    missing = [
        f"--data-path: {file} is {'empty' if file.is_file() else 'missing'}; {bert_data.TOOL} "
        "makes PREFIX_text_sentence.bin and .idx files from text"
        for file in files
        if not file.is_file() or not file.stat().st_size
    ]
    if missing:
        raise RankConfigError(missing)


def _sets(config: Any) -> Iterator[tuple[str, Split, tuple[float, float]]]:
    """Yield prefix, set, and the set's part of the documents, for all data in use."""
    parts = config.split_matrix or [(0.0, 1.0)] * len(Split)
    blends = config.blend_per_split or [config.blend] * len(Split)
    for split, blend, part in zip(Split, blends, parts, strict=True):
        if blend is not None and part is not None:
            yield from ((prefix, split, part) for prefix in blend[0])


def check_sets(config: Any, num_samples: list[int]) -> None:
    """Check the tokenizer and the documents before Megatron looks for samples in them.

    Args:
        config: Of the data sets.
        num_samples: Of the training, validation and test set.

    Raises:
        ConfigError: The tokenizer does not suit.
        RankConfigError: The documents do not.
    """
    bert_data.check_tokenizer(config.tokenizer)
    min_sentences = 2 if config.classification_head else 1
    problems = []
    for prefix, split, part in _sets(config):
        samples = num_samples[split.value]
        if split is Split.train and samples == 0:  # with --skip-train
            continue
        dataset = IndexedDataset(prefix)
        documents = BERTMaskedWordPieceDataset.numel_low_level_dataset(dataset)
        first, last = (round(edge * float(documents)) for edge in part)  # as the builder does
        where = f"{prefix}, {split.name} set"
        problems += bert_data.document_problems(
            dataset, first, last, samples, config.tokenizer, min_sentences, where
        )
    if problems:
        raise RankConfigError(problems)


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple:
    """Build the training, validation and test sets of the given numbers of samples."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = BERTMaskedWordPieceDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        tokenizer=build_tokenizer(args),
        masking_probability=args.mask_prob,
        short_sequence_probability=args.short_seq_prob,
        masking_max_ngram=3,
        masking_do_full_word=True,
        masking_do_permutation=False,
        masking_use_longer_ngrams=False,
        masking_use_geometric_distribution=False,
        classification_head=args.bert_binary_head,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
    )
    check_sets(config, num_samples)
    print_rank_0("> building train, validation, and test datasets for BERT ...")
    return BlendedMegatronDatasetBuilder(
        BERTMaskedWordPieceDataset,
        num_samples,
        lambda: mpu.get_tensor_model_parallel_rank() == 0,
        config,
    ).build()


# Megatron reads this, and then calls the function on every rank.
datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def main() -> None:
    """Parse Megatron's arguments and train. Megatron's releases differ here."""
    from megatron.training.arguments import parse_args

    defaults = {"tokenizer_type": "BertWordPieceLowerCase"}
    model_type = ModelType.encoder_or_decoder
    # For our own check, before Megatron builds the tokenizer.
    args = parse_args()
    args.tokenizer_type = args.tokenizer_type or defaults["tokenizer_type"]
    check_args(args)
    if RELEASE < (0, 18):
        pretrain(
            datasets_provider, model_provider, model_type, forward_step, args_defaults=defaults
        )
        return

    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    config = pretrain_cfg_container_from_args(parse_and_validate_args(args_defaults=defaults))
    if RELEASE < (0, 19):
        pretrain(config, datasets_provider, model_provider, model_type, forward_step)
    else:
        pretrain(config, datasets_provider, model_type, forward_step, model_provider)


if __name__ == "__main__":
    main()
