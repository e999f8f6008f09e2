"""The matrix of check_layouts.py as data: layouts, models, features, and which rows to run.

A row is LAYOUT MODEL FEATURES. Layouts and features are put together from parts, so that any
product has a name: TP2+SPxCP2xPP2, recompute-block+bf16.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

# {part: (flags with the size, what it is)}; the size follows the name, as in TP2.
SIZES = {
    "TP": ("--tensor-model-parallel-size {}", "tensor parallelism"),
    "PP": ("--pipeline-model-parallel-size {}", "pipeline parallelism"),
    "VPP": ("--num-virtual-stages-per-pipeline-rank {}", "model chunks on each pipeline rank"),
    "CP": ("--context-parallel-size {}", "context parallelism (zigzag)"),
    "EP": ("--expert-model-parallel-size {}", "expert parallelism, over data-parallel ranks"),
    "DP": ("", "data parallelism"),
}
SWITCHES = {
    "SP": ("--sequence-parallel", "sequence parallelism"),
    "DO": ("--use-distributed-optimizer", "distributed optimizer"),
    "overlap-grad": ("--overlap-grad-reduce", "gradients reduced during the backward pass"),
    "overlap": (
        "--overlap-grad-reduce --overlap-param-gather",
        "that, and parameters gathered during the forward pass (needs DO)",
    ),
    "fresh": ("", "from the initial weights instead of a checkpoint; compared without DO"),
}
ALONE = "1"

# What every run has. Gradients are not clipped: the norm is summed in another order on each layout.
VOCAB_SIZE = 127
COMMON = (
    "--num-layers 8 --hidden-size 32 --num-attention-heads 4 --seq-length 64 "
    "--max-position-embeddings 64 --attention-dropout 0 --hidden-dropout 0 "
    f"--tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE} --make-vocab-size-divisible-by 8 "
    "--split 90,5,5 --num-workers 0 --micro-batch-size 2 --global-batch-size 16 --lr 3e-3 "
    "--min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 1 --lr-decay-iters 20 "
    "--clip-grad 1000 --log-interval 1 --eval-interval 1000 --eval-iters 0"
)
# A fixed number of strata, so that every layout keeps the same tokens.
RANDOM_LTD = (
    "--random-ltd --random-ltd-min-tokens 16 --random-ltd-increment 8 --random-ltd-strata 8"
)
RAMP = "--random-ltd-ramp-iters 12"
MOCK_DATA = "--mock-data --no-create-attention-mask-in-dataloader"

ROPE = "--position-embedding-type rope"
UNTIED = "--untie-embeddings-and-output-weights"
LLAMA = (
    f"{ROPE} {UNTIED} --normalization RMSNorm --swiglu --disable-bias-linear "
    "--group-query-attention --num-query-groups 2"
)
LATENT = (
    f"{ROPE} --no-rope-fusion {UNTIED} --normalization RMSNorm --swiglu --disable-bias-linear "
    "--multi-latent-attention --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 4 "
    "--v-head-dim 8"
)
HYBRID = "--spec megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec"
PATTERN = "--hybrid-layer-pattern"
MOE = f"{LLAMA} --num-experts 4 --moe-router-topk 2 --moe-aux-loss-coeff 0.01"
ALLTOALL = "--moe-token-dispatcher-type alltoall"

BERT = "bert"

MODELS = {
    "learned": f"--position-embedding-type learned_absolute {UNTIED}",
    "rope": f"{ROPE} {UNTIED}",
    "rope-half": f"{ROPE} {UNTIED} --rotary-percent 0.5",
    "rope-interleaved": f"{ROPE} {UNTIED} --rotary-interleaved",
    "tied": ROPE,
    "gqa": f"{ROPE} {UNTIED} --group-query-attention --num-query-groups 2",
    "llama": LLAMA,
    "mtp": f"{LLAMA} --mtp-num-layers 1",
    "moe": f"{MOE} {ALLTOALL}",
    "moe-allgather": f"{MOE} --moe-token-dispatcher-type allgather",
    "moe-shared": (
        f"{MOE} {ALLTOALL} --moe-layer-freq 2 --moe-shared-expert-intermediate-size 64 "
        "--moe-router-score-function sigmoid --moe-z-loss-coeff 0.001"
    ),
    "moe-mtp": f"{MOE} {ALLTOALL} --mtp-num-layers 1",
    "mla": f"{LATENT} --rope-type rope",
    "mla-yarn": f"{LATENT} --rope-type yarn --q-lora-rank 12",
    "hybrid": f"{LLAMA} {HYBRID} {PATTERN} {'*-' * 8}",
    "hybrid-moe": f"{MOE} {ALLTOALL} {HYBRID} {PATTERN} {'*E' * 8}",
    "hybrid-mla": f"{LATENT} --rope-type yarn {HYBRID} {PATTERN} {'+-' * 8}",
    # Learned positions, tied embeddings, two heads; its samples are padded to different lengths.
    BERT: (
        "--data-path {sentences} --tokenizer-type HuggingFaceTokenizer "
        "--tokenizer-model {tokenizer} --short-seq-prob 0.3 --split 100,0,0"
    ),
}


@dataclass(frozen=True)
class Feature:
    """Flags to combine with any model and layout.

    Attributes:
        flags: Of Megatron, or of random-LTD; {documents} is the path of a data set.
        alone: Whether the run in one process has them too, because they change what is computed.
        low_precision: Whether to judge by the difference that plain Megatron has.
        control: Whether the losses must differ, to show that the comparison would notice.
    """

    flags: str
    alone: bool = False
    low_precision: bool = False
    control: bool = False


_SELECTIVE = "--recompute-granularity selective"
_FULL = "--recompute-granularity full --recompute-method"
_SPLIT = "--decoder-{}-pipeline-num-layers {}"
_EMBEDDING = "--account-for-embedding-in-pipeline-split"
_LOSS = "--account-for-loss-in-pipeline-split"
NONE = "none"

FEATURES = {
    NONE: Feature(""),
    "recompute-uniform": Feature(f"{_FULL} uniform --recompute-num-layers 1"),
    "recompute-groups": Feature(f"{_FULL} uniform --recompute-num-layers 4"),
    "recompute-block": Feature(f"{_FULL} block --recompute-num-layers 3"),
    "recompute-distributed": Feature(
        f"{_FULL} uniform --recompute-num-layers 1 --distribute-saved-activations"
    ),
    "recompute-selective": Feature(_SELECTIVE),
    "recompute-mlp": Feature(f"{_SELECTIVE} --recompute-modules core_attn mlp"),
    "recompute-moe": Feature(f"{_SELECTIVE} --recompute-modules core_attn moe"),
    "recompute-norm": Feature(f"{_SELECTIVE} --recompute-modules layernorm"),
    "documents": Feature(
        "--data-path {documents} --reset-attention-mask --reset-position-ids --eod-mask-loss",
        alone=True,
    ),
    "eod-mask": Feature(
        "--data-path {documents} --eod-mask-loss --no-create-attention-mask-in-dataloader",
        alone=True,
    ),
    "per-token-loss": Feature("--calculate-per-token-loss", alone=True),
    "split-first-last": Feature(f"{_SPLIT.format('first', 1)} {_SPLIT.format('last', 3)}"),
    "split-first": Feature(_SPLIT.format("first", 2)),
    "split-embedding": Feature(_EMBEDDING),
    "split-loss": Feature(_LOSS),
    "split-both": Feature(f"{_EMBEDDING} {_LOSS}"),
    "layout-4": Feature("--pipeline-model-parallel-layout Et|ttt|tt|ttL"),
    "layout-8": Feature("--pipeline-model-parallel-layout E|t|tt|t|tt|t|t|L"),
    "layout-mtp": Feature("--pipeline-model-parallel-layout Ett|tt|ttt|tmL"),
    # Four chunks, of which three end inside a group.
    "pipes": Feature(f"{PATTERN} *-*-*|-*-*|-*-*-|*-"),
    "two-micro-batches": Feature("--global-batch-size 4", alone=True),
    "micro-batch-1": Feature("--micro-batch-size 1"),
    "clip": Feature("--clip-grad 0.5", alone=True),
    "bf16": Feature("--bf16", alone=True, low_precision=True),
    "dropout": Feature("--hidden-dropout 0.1 --attention-dropout 0.1", alone=True),
    "hidden-dropout": Feature("--hidden-dropout 0.1", alone=True),
    "shared-indices": Feature("--random-ltd-shared-indices", alone=True),
    "ramp-samples": Feature("--random-ltd-ramp-samples 192", alone=True),
    "all-layers": Feature("--random-ltd-layers 1-8", alone=True),
    "some-layers": Feature("--random-ltd-layers 2,4-5,7", alone=True),
    "grow": Feature("--random-ltd-grow-micro-batch 4"),
    "other-seed": Feature("--random-ltd-seed 7 --override-opt-param-scheduler", control=True),
}

# Blocks of rows: every layout with every model with every features.
QUICK = (
    ("TP2+SP PP2 CP2 DP2+DO+overlap TP2+SPxCP2xPP2", "rope", "none"),
    ("EP2 EP2xTP2+SPxPP2", "moe", "none"),
)
_RECOMPUTE = "recompute-uniform recompute-groups recompute-block recompute-selective recompute-mlp"
MATRIX = (
    ("TP2 TP4 TP2+SP TP4+SP PP2 PP4 PP2xVPP2 PP4xVPP2 CP2 CP4 DP2 DP4", "rope", "none"),
    ("DP2+overlap-grad DP2+DO DP2+DO+overlap DP2+DO+overlap+fresh DO+fresh", "rope", "none"),
    ("TP2xPP2 TP2xDP2 CP2xDP2 TP2+SPxPP2xVPP2 CP2xPP2xVPP2 TP2+SPxCP2", "rope", "none"),
    ("TP2xPP2xDP2 TP2+SPxPP2xDP2+DO+overlap TP2+SPxCP2xPP2 DP2xCP2xTP2", "rope", "none"),
    ("DP2", "rope", "two-micro-batches"),
    (
        "TP2+SP PP2xVPP2 CP2 TP2+SPxCP2xPP2",
        "learned rope-half rope-interleaved tied gqa llama mtp",
        "none",
    ),
    ("EP2 EP4 EP2+DO+overlap EP2xTP2+SP EP2xCP2 EP2xDP4 EP2xPP2xVPP2", "moe", "none"),
    ("TP2+SP PP2xVPP2 CP2 EP2xTP2xPP2 EP2xTP2+SPxPP2 EP2xTP2+SPxPP2+DO", "moe", "none"),
    ("EP2xTP2+SPxPP2", "moe-allgather moe-shared moe-mtp", "none"),
    ("1 TP2+SP PP2xVPP2 DP2+DO+overlap", "llama", _RECOMPUTE),
    ("TP2 TP2xPP2", "llama", "recompute-distributed"),
    ("EP2xTP2+SPxPP2", "moe", "recompute-uniform recompute-block recompute-moe"),
    ("PP4", "llama", "split-first-last layout-4 split-first-last+recompute-uniform"),
    ("PP2", "llama", "split-first layout-4 layout-8"),
    ("PP3", "llama", "split-embedding split-loss"),
    ("PP5", "llama", "split-both"),
    ("PP4", "mtp", "layout-mtp"),
    ("TP2+SPxPP4", "llama", "layout-8+recompute-block"),
    ("TP2 TP2+SP PP2 PP4 CP2 DP2+DO+overlap", "learned", "documents"),
    ("TP2+SP PP2", "rope", "documents+recompute-uniform"),
    ("TP2+SPxCP2xPP2", "rope", "eod-mask eod-mask+per-token-loss"),
    ("CP2", "learned", "documents+per-token-loss"),
    ("TP2+SP PP2xVPP2 CP2 DP2+DO+overlap TP2+SPxCP2xPP2", "llama", "bf16"),
    ("EP2 EP2xTP2+SPxPP2", "moe", "bf16"),
    ("1", "llama", "recompute-norm"),
    (
        "1",
        "rope",
        "dropout+recompute-uniform dropout+recompute-block dropout+recompute-selective",
    ),
    ("TP2 TP2+SP PP2 CP2 DP2", "rope", "hidden-dropout"),
    (
        "TP2+SPxPP2 CP2xDP2",
        "llama",
        "shared-indices ramp-samples all-layers some-layers clip",
    ),
    ("1 DP2", "llama", "micro-batch-1"),
    (
        "1 TP2+SP PP2 PP2xVPP2 CP2 DP2+DO+overlap TP2+SPxCP2xPP2",
        "llama",
        "all-layers+grow",
    ),
    ("EP2xTP2+SPxPP2", "moe moe-allgather moe-shared", "all-layers+grow"),
    ("1 TP2+SPxCP2xPP2", "rope", "eod-mask+grow eod-mask+per-token-loss+grow"),
    ("1 PP2", "learned", "documents+grow"),
    ("TP2+SPxPP2", "llama", "shared-indices+grow recompute-uniform+grow"),
    ("TP2+SP PP2xVPP2 CP2 TP2+SPxCP2xPP2", "mla mla-yarn", "none"),
    ("1 TP2+SPxPP2", "mla-yarn", "recompute-uniform"),
    ("TP2+SP PP2 PP4 CP2 DP2+DO+overlap TP2+SPxCP2xPP2", "hybrid", "none"),
    ("PP2 PP4 TP2+SPxPP2", "hybrid", "pipes"),
    ("TP2+SPxPP2", "hybrid", "pipes+recompute-uniform"),
    ("EP2xTP2+SPxPP2", "hybrid-moe", "none"),
    ("TP2+SPxCP2xPP2", "hybrid-mla", "none"),
    ("TP2 TP4+SP PP4 PP2xVPP2 DP2+DO+overlap TP2+SPxPP2xDP2+DO", "bert", "none"),
    ("1 TP2+SPxPP2", "bert", "recompute-uniform recompute-block all-layers+grow"),
    ("1 TP2+SPxPP2", "rope", "other-seed"),
)


class UnknownName(ValueError):
    """A name is none of the tables'."""


@dataclass(frozen=True)
class Row:
    """One comparison: names of a layout, a model and features."""

    layout: str
    model: str
    features: str

    @property
    def chosen(self) -> list[Feature]:
        """The features."""
        return [FEATURES[name] for name in self.features.split("+")]


def layout_parts(layout: str) -> tuple[dict[str, int], list[str]]:
    """Return the sizes and the switches of a layout such as TP2+SPxPP2.

    Experts are spread over the data-parallel ranks, so that without DP there are EP of these.

    Raises:
        UnknownName: A part is unknown.
    """
    sizes, switches = {}, []
    for part in re.split("[x+]", layout) if layout != ALONE else ():
        found = re.fullmatch(r"([A-Z]+)(\d+)", part)
        if found and found[1] in SIZES:
            sizes[found[1]] = int(found[2])
        elif part in SWITCHES:
            switches.append(part)
        else:
            sized = ", ".join(f"{name}2" for name in SIZES)
            raise UnknownName(
                f"--layouts {layout}: {part or 'an empty name'} is none of {sized} (any number), "
                f"{', '.join(SWITCHES)}; join them with x or +, as in TP2+SPxPP2; alone it is "
                f"{ALONE}"
            )
    sizes.setdefault("DP", sizes.get("EP", 1))
    return dict.fromkeys(SIZES, 1) | sizes, switches


def processes(layout: str) -> int:
    """Return the number of processes of a layout."""
    sizes, _ = layout_parts(layout)
    return sizes["TP"] * sizes["PP"] * sizes["CP"] * sizes["DP"]


def layout_flags(layout: str) -> str:
    """Return Megatron's flags for a layout."""
    sizes, switches = layout_parts(layout)
    flags = [SIZES[name][0].format(size) for name, size in sizes.items() if size > 1]
    return " ".join(filter(None, [*flags, *(SWITCHES[name][0] for name in switches)]))


def check_name(option: str, name: str, table: Iterable[str]) -> None:
    """Raise UnknownName, listing the table, unless it has the name."""
    if name not in table:
        raise UnknownName(f"{option} {name or 'an empty name'}: choose of {', '.join(table)}")


def rows(layouts: Iterable[str], models: Iterable[str], features: Iterable[str]) -> list[Row]:
    """Return a row for each layout, model and features.

    Raises:
        UnknownName: There is no such layout, model or feature.
    """
    found = [Row(*names) for names in product(layouts, models, features)]
    for row in found:
        layout_parts(row.layout)
        check_name("--models", row.model, MODELS)
        for feature in row.features.split("+"):
            check_name("--features", feature, FEATURES)
    return found


def blocks(table: Iterable[tuple[str, str, str]]) -> Iterator[Row]:
    """Yield the rows of a table of blocks, each once."""
    found = (row for block in table for row in rows(*(names.split() for names in block)))
    yield from dict.fromkeys(found)
