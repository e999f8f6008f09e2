"""The tokens and losses of a model's forward passes, for a policy that learns from them.

Shapes: b samples, s sequence length.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from megatron_rltd.tokens.policies import Policy


def observe(model: Any, policy: Policy, is_in_step: Callable[[], bool]) -> None:
    """Override a model's forward: in training steps, a policy sees its token ids and its losses.

    Args:
        model: A ``GPTModel`` or ``BertModel`` that is the whole model, in no pipeline.
        is_in_step: Whether a training step has begun.
    """
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (model.training and is_in_step()):
            return original(*args, **kwargs)
        return _run(model, original, policy, *args, **kwargs)

    model.forward = forward


def _run(model: Any, original: Callable, policy: Policy, *args: Any, **kwargs: Any) -> Any:
    """Run a model and show a policy what it was called with and returned.

    Raises:
        RuntimeError: The call gives the model no token ids or no labels.

    Source: ``megatron/core/models/gpt/gpt_model.py:GPTModel.forward`` returns the losses [b, s] if
    it gets labels, ``megatron/core/models/bert/bert_model.py:BertModel.forward`` a tuple that
    begins with them.
    """
    arguments = _signature(model.__class__).bind(model, *args, **kwargs).arguments
    is_bert = "lm_labels" in _signature(model.__class__).parameters
    labels = arguments.get("lm_labels" if is_bert else "labels")
    if arguments.get("input_ids") is None or labels is None:
        raise RuntimeError(
            "random-LTD: token-bypass learns from the losses of the model, so each call of the "
            f"model in a training step needs input_ids and {'lm_labels' if is_bert else 'labels'}"
        )
    policy.begin(arguments["input_ids"])
    output = original(*args, **kwargs)
    losses = output[0] if is_bert else output
    if is_bert:
        counted = labels >= 0  # BERT's data sets label what is not masked with -1
    else:
        mask = arguments.get("loss_mask")
        counted = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask > 0
    policy.observe(labels, losses, counted.view_as(labels))
    return output


@functools.cache
def _signature(model_class: Any) -> inspect.Signature:
    return inspect.signature(model_class.forward)
