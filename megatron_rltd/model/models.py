"""The kinds of models in whose layers tokens can drop, and what each cannot do."""

from collections.abc import Iterable, Iterator
from typing import Any

from megatron_rltd.config import ConfigError, ModelError, RandomLTDConfig, flag
from megatron_rltd.patching import versions
from megatron_rltd.refusals import (
    BERT_WITH_CONTEXT_PARALLELISM,
    find_refused_in_model,
    find_refused_vision_layout,
)


def find_models(chunks: Iterable[Any]) -> list[Any]:
    """Return the models in a pipeline rank's chunks, which may be wrapped.

    Raises:
        ModelError: There is none.
    """
    chunks = list(chunks)
    models = list(_language_models(chunks)) or list(_vision_models(chunks))
    if not models:
        raise ModelError(
            "random-LTD: there is no GPTModel, HybridModel (of megatron-core 0.18 or newer), "
            "BertModel or CLIPViTModel to drop tokens in; a vision tower never drops"
        )
    return models


def block_of(model: Any) -> Any:
    """Return the block of a model's layers."""
    return model.decoder if hasattr(model, "decoder") else model.encoder


def length_of(model: Any) -> int:
    """Return the tokens of a sample that a model was built for."""
    return model.seq_length if _is_vision(model) else model.max_sequence_length


def check_models(models: list[Any], config: RandomLTDConfig) -> None:
    """Check that random-LTD works on the models of a pipeline rank.

    Raises:
        ConfigError: It does not; the message names every problem.
    """
    configs = [block_of(model).config for model in models]
    problems = [problem for c in configs for problem in find_refused_in_model(c, config)]
    if _is_vision(models[0]):
        problems += find_refused_vision_layout(configs[0])
    if hasattr(models[0], "encoder") and configs[0].context_parallel_size > 1:
        problems.append(BERT_WITH_CONTEXT_PARALLELISM)
    if config.policy == "token-bypass" and not _is_whole_language_model(models):
        wanted = "a GPTModel or BertModel that is whole on each rank"
        problems.append(f"{flag('policy')} token-bypass needs {wanted}: use random")
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def _is_vision(model: Any) -> bool:
    return not hasattr(model, "max_sequence_length")


def _is_whole_language_model(models: list[Any]) -> bool:
    """Return whether a rank sees the tokens and the losses of its model."""
    if len(models) > 1 or _is_vision(models[0]) or hasattr(models[0], "hybrid_layer_pattern"):
        return False
    return models[0].pre_process and models[0].post_process


def _language_models(models: Iterable[Any]) -> Iterator[Any]:
    """Yield every GPTModel, HybridModel and BertModel in `models`, which may be wrapped."""
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.core.models.gpt import GPTModel

    kinds = [GPTModel, BertModel]
    if versions.release() >= (0, 18):
        from megatron.core.models.hybrid.hybrid_model import HybridModel

        kinds.append(HybridModel)
    for model in models:
        yield from (m for m in model.modules() if isinstance(m, tuple(kinds)))


def _vision_models(models: Iterable[Any]) -> Iterator[Any]:
    """Yield every CLIPViTModel in `models` that is not the vision tower of a larger model."""
    from megatron.core.models.vision.clip_vit_model import CLIPViTModel

    for model in models:
        modules = list(model.modules())
        # A multimodal model has this attribute also on the pipeline stages of its tower, where no
        # language model is.
        if not any(hasattr(m, "language_model") for m in modules):
            yield from (m for m in modules if isinstance(m, CLIPViTModel))
