"""The flags of a Megatron-DeepSpeed launch line, and which of them Megatron-LM does not have.

Part of `python -m megatron_rltd convert-deepspeed`.
"""

import re
import shlex
from dataclasses import dataclass, field

PREFIXES = tuple(
    "--deepspeed --deepscale --zero- --ds- --ds_ --data-efficiency --curriculum".split()
)
# Flags of Megatron-DeepSpeed's arguments.py that no megatron-core from 0.17 to 0.19 parses.
FORK_ONLY = set(
    """
    --DDP-impl --aml-data-download-path --checkpoint-in-cpu --checkpoint-num-layers
    --contigious-checkpointing --cpu-optimizer --cpu_torch_adam --create-moe-param-group --data-impl
    --disable-mem-efficient-ln --disable-moe-token-dropping --disable-moe-top2-2nd-expert-sampling
    --distribute-checkpointed-activations --embedding-weights-in-fp32 --enable-zbh1-exact-semantics
    --enable-expert-tensor-parallelism --enable-zbh1-pipeline --expert-interval --fp8-e4m3
    --force-ds-sequence-parallel --fp8-hybrid --hidden-size-teacher --inference --kd --kd-alpha-ce
    --kd-beta-ce --kd-temp --kill-switch-file --layernorm-epsilon --load-tag --load-teacher
    --log-batch-size-to-tensorboard --log-optimizer-states-to-tensorboard --lr-decay-tokens
    --lr-warmup-tokens --memory-centric-tiled-linear --mlp-type --mmap-warmup
    --moe-eval-capacity-factor --moe-expert-parallel-size --moe-loss-coeff --moe-min-capacity
    --moe-train-capacity-factor --mos --no-async-tensor-model-parallel-allreduce
    --no-contiguous-buffers-in-local-ddp --no-load-lr-state --no-log-learnig-rate-to-tensorboard
    --no-pipeline-parallel --no-query-key-layer-scaling
    --num-attention-heads-teacher --num-experts-switch --num-experts-teacher --num-key-value-heads
    --num-layers-teacher --overlap-p2p-communication --partition-activations
    --pipeline-model-parallel-split-rank --profile-backward --profile_steps --remote-device
    --repeated-dataloader --reset-iteration --return-data-index --rotary-position-embeddings-theta
    --scattered-embeddings --split-transformers --standalone-embedding-stage
    --synchronize-each-layer --tile-factor --topk --train-data-exact-num-epochs --train-desc-path
    --train-doc-idx-path --train-idx-path --train-sample-idx-path --train-shuffle-idx-path
    --train-tokens --universal-checkpoint --use-dataset-only --use-flash-attn-builder
    --use-flash-attn-triton --use-flash-attn-v2 --use-pin-memory --use-tutel
    """.split()
)
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
# Megatron's replacements for removed flags.
INSTEAD = {
    "--checkpoint-activations": RECOMPUTE,  # parsed by Megatron, which then exits
    "--deepspeed-activation-checkpointing": RECOMPUTE,
    "--zero-stage": "--use-distributed-optimizer for stage 1",
    "--layernorm-epsilon": "--norm-epsilon",
    "--num-key-value-heads": "--group-query-attention --num-query-groups",
    "--rotary-position-embeddings-theta": "--rotary-base",
    "--use-flash-attn-v2": "--attention-backend flash",
    "--ds-sequence-parallel-size": "--context-parallel-size",
    "--moe-expert-parallel-size": "--expert-model-parallel-size",
}
FLAG = re.compile(r"--?[A-Za-z]")
SHELL = re.compile(r"\d?&?>|[|;&]")  # the command ends here
VARIABLE = re.compile(r"\$\{?\w+\}?$")


class ConversionError(ValueError):
    """A configuration that cannot be converted; the message is one line."""


def is_foreign(flag: str) -> bool:
    """Return whether Megatron-LM cannot take a flag of Megatron-DeepSpeed."""
    return flag.startswith(PREFIXES) or flag in FORK_ONLY or flag in INSTEAD


@dataclass(frozen=True)
class Launch:
    """The flags of a launch line, {name: values}; of a repeated flag the last counts.

    Empty where none was given.
    """

    options: dict[str, list[str]] = field(default_factory=dict)

    def __contains__(self, flag: str) -> bool:
        return flag in self.options

    def text(self, flag: str) -> str:
        """Return a flag with its values."""
        return " ".join([flag, *self.options[flag]])

    def integer(self, *flags: str, least: int = 1) -> int | None:
        """Return the value of the first of `flags` that is there, or None.

        Raises:
            ConversionError: It is no whole number, or less than `least`.
        """
        flag = next((f for f in flags if f in self.options), None)
        if flag is None:
            return None
        try:
            (value,) = self.options[flag]
            number = int(value)
        except ValueError:
            raise ConversionError(
                f"{self.text(flag)}: must be one whole number; replace shell variables by values"
            ) from None
        if number < least:
            raise ConversionError(f"{self.text(flag)}: must be at least {least}")
        return number


def parse_words(words: list[str]) -> Launch:
    """Return the flags among the words of a command line; launcher and script are left out.

    Raises:
        ConversionError: There are no flags, or a shell variable may hold some.
    """
    script = next((i for i, word in enumerate(words) if word.endswith(".py")), -1)
    options: dict[str, list[str]] = {}
    flag = None
    for word in words[script + 1 :]:
        if SHELL.match(word):
            break
        name, equals, value = word.partition("=")
        if FLAG.match(word):
            flag = name
            options[flag] = [value] if equals else []
        elif VARIABLE.match(word) and (flag is None or options[flag]):
            raise ConversionError(
                f"the launch line has {word}, which may hold flags: replace it by its value"
            )
        elif flag is not None:
            options[flag].append(word)
    if not options:
        raise ConversionError("the launch line has no flags")
    return Launch(options)


def parse_text(text: str) -> Launch:
    """Return the flags in the text of a file, as a shell would read it.

    Raises:
        ConversionError: See `parse_words`; or a quotation mark is left open.
    """
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    try:
        return parse_words(shlex.split("\n".join(lines).replace("\\\n", " ")))
    except ValueError as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"the launch line cannot be read: {error}") from None
