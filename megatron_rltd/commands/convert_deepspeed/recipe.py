"""Read random-LTD's section of a DeepSpeed configuration.

Part of `python -m megatron_rltd convert-deepspeed`. The keys are those that DeepSpeed reads
(deepspeed/runtime/data_pipeline/constants.py); what it refuses is refused here too.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rltd.commands.convert_deepspeed.launch import ConversionError

RANDOM_LTD = "data_efficiency.data_routing.random_ltd"
SCHEDULE = f"{RANDOM_LTD}.random_ltd_schedule"
STEPS = f"{SCHEDULE}.schedule_config"
LAYER_TOKEN_LR = f"{RANDOM_LTD}.layer_token_lr_schedule"
# Megatron's own masks and layouts are known; the batch sizes are overwritten by DeepSpeed itself.
NOT_NEEDED = "model_mask_name model_type hidden_state_order global_batch_size micro_batch_size"
KNOWN = {
    RANDOM_LTD: "enabled total_layer_num random_ltd_layer_num random_ltd_layer_id "
    f"random_ltd_schedule layer_token_lr_schedule {NOT_NEEDED}",
    SCHEDULE: "min_value max_value schedule_type schedule_config",
    STEPS: "require_steps seq_per_step",
}
CURRICULA = ("data_efficiency.data_sampling", "curriculum_learning")


@dataclass(frozen=True)
class Recipe:
    """What a configuration says, in DeepSpeed's words.

    Attributes:
        layers: random_ltd_layer_id as Megatron counts, from 1, ascending.
        batch_size: train_batch_size, None if it is not there.
        not_needed: Keys that have no flag.
        warnings: What of the rest is not converted.
    """

    total_layer_num: int
    layers: tuple[int, ...]
    min_value: int
    max_value: int
    require_steps: int
    seq_per_step: int
    batch_size: int | None
    not_needed: list[str]
    warnings: list[str]


def read_text(path: Path) -> str:
    """Return the text of a file, or raise a ConversionError."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConversionError(f"cannot read {path}: {reason}") from None


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        ConversionError: It cannot be read, or is not JSON; what a script should replace is named.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        # In DeepSpeed's templates, words outside quotation marks are what a script replaces.
        outside = re.sub(r'"(?:\\.|[^"\\])*"', '""', text)
        words = dict.fromkeys(re.findall(r"[:\[,]\s*([A-Z][A-Z0-9]*_\w+|[A-Z]{3,}\w*)", outside))
        raise ConversionError(
            f"{path} has placeholders: replace {', '.join(words)}"
            if words
            else f"{path} is not JSON (which allows no comments or trailing commas): {error}"
        ) from None


def section(config: Any, path: str) -> dict[str, Any]:
    """Return the object at a dotted path, empty if there is none."""
    for name in path.split(".") if path else ():
        config = config.get(name, {}) if isinstance(config, dict) else None
    if not isinstance(config, dict):
        raise ConversionError(f"{path or 'the configuration'} is not an object")
    return config


def whole(config: Any, path: str, name: str) -> int:
    """Return a positive whole number; 2e5 is one."""
    values, full_name = section(config, path), f"{path}.{name}".lstrip(".")
    if name not in values:
        raise ConversionError(f"{full_name} is missing")
    value = values[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or value < 1 or value % 1:
        raise ConversionError(f"{full_name} is {json.dumps(value)}, not a positive whole number")
    return int(value)


def read_layers(config: Any) -> tuple[int, ...]:
    """Return random_ltd_layer_id, counted from 1."""
    ids = section(config, RANDOM_LTD).get("random_ltd_layer_id")
    if not isinstance(ids, list) or any(type(i) is not int or i < 0 for i in ids):
        raise ConversionError(
            f"{RANDOM_LTD}.random_ltd_layer_id must be a list of layers, counted from 0"
        )
    count = whole(config, RANDOM_LTD, "random_ltd_layer_num")
    if not count == len(ids) == len(set(ids)):
        raise ConversionError(
            f"{RANDOM_LTD}.random_ltd_layer_num is {count}, random_ltd_layer_id has "
            f"{len(set(ids))} layers in {len(ids)} entries: DeepSpeed refuses that too"
        )
    return tuple(sorted(i + 1 for i in ids))


def read_recipe(config: Any) -> Recipe:
    """Return what a configuration says of random-LTD.

    Raises:
        ConversionError: random-LTD is off, or DeepSpeed could not train with this.
    """
    ltd = section(config, RANDOM_LTD)
    enabled = ltd.get("enabled", False)
    if enabled is not True:
        raise ConversionError(
            f"nothing to convert: {RANDOM_LTD}.enabled is {json.dumps(enabled)}"
            if ltd
            else f"nothing to convert: there is no {RANDOM_LTD}"
        )
    kind = section(config, SCHEDULE).get("schedule_type")
    if kind != "fixed_linear":
        raise ConversionError(
            f"{SCHEDULE}.schedule_type is {json.dumps(kind)}: DeepSpeed knows fixed_linear only"
        )
    batch = section(config, "").get("train_batch_size", "auto")
    return Recipe(
        total_layer_num=whole(config, RANDOM_LTD, "total_layer_num"),
        layers=read_layers(config),
        min_value=whole(config, SCHEDULE, "min_value"),
        max_value=whole(config, SCHEDULE, "max_value"),
        require_steps=whole(config, STEPS, "require_steps"),
        seq_per_step=whole(config, STEPS, "seq_per_step"),
        batch_size=None if batch == "auto" else whole(config, "", "train_batch_size"),
        not_needed=[key for key in ltd if key in NOT_NEEDED.split()],
        warnings=list(read_warnings(config)),
    )


def read_warnings(config: Any) -> Iterator[str]:
    """Say what of a configuration is not converted, or not what it seems."""
    for path in ("data_efficiency", "data_efficiency.data_routing"):
        if section(config, path).get("enabled") is not True:
            yield (
                f"{path}.enabled is not true; DeepSpeed drops tokens anyway, and so will these "
                "flags"
            )
    for path, known in KNOWN.items():
        unknown = sorted(section(config, path).keys() - known.split())
        if unknown:
            yield f"unknown keys in {path}, ignored by DeepSpeed and here: {', '.join(unknown)}"
    if section(config, LAYER_TOKEN_LR).get("enabled"):
        yield (
            f"{LAYER_TOKEN_LR} is not converted, because DeepSpeed stops with NotImplementedError; "
            "use --layer-token-lr with --lr-warmup-samples and --lr-decay-samples"
        )
    for path in CURRICULA:
        if section(config, path).get("enabled"):
            yield f"{path} is not converted: there is no curriculum learning here"
    if section(config, RANDOM_LTD).get("hidden_state_order") == "batch_seq_dim":
        yield (
            "hidden_state_order batch_seq_dim belongs to a model outside Megatron, but the flags "
            "are for Megatron-core's GPT and BERT; iterations and require_steps are optimizer "
            "steps, but DeepSpeedExamples' logs count micro-batches"
        )
