"""What a policy of `megatron_rltd.tokens.policies` needs from Megatron's loop.

That is the tokenizer's special tokens, and a place in the checkpoint for what it has learned.
"""

from typing import Any

from megatron_rltd.model.random_ltd import RandomLTD

_STATE = "random_ltd_policy_state"
_SPECIAL = ("cls", "sep", "mask", "unk", "bos", "eod")


def special_tokens(random_ltd: RandomLTD) -> dict[str, Any]:
    """Return the arguments of `RandomLTD.attach` that name the tokenizer's special tokens."""
    if random_ltd.config.policy != "token-bypass":
        return {}
    from megatron.training import get_tokenizer

    tokenizer = get_tokenizer()
    always = {token for name in _SPECIAL if (token := _token(tokenizer, name)) is not None}
    padding = _token(tokenizer, "pad")
    # GPT-2's tokenizer, for example, pads with another special token.
    last = set() if padding is None else {padding} - always
    return {"always_kept": sorted(always), "padding": sorted(last)}


def _token(tokenizer: Any, name: str) -> int | None:
    """Return the id of a special token; None if the tokenizer has no such token."""
    try:
        token = getattr(tokenizer, name)
    except (AttributeError, NotImplementedError):
        return None
    return token if isinstance(token, int) and token >= 0 else None


def save(args: Any, random_ltd: RandomLTD) -> None:
    """Put what the policy has learned where checkpoints hold it: on Megatron's ``args``."""
    state = random_ltd.policy_state()
    if state is not None:
        setattr(args, _STATE, state)


def load(checkpoint_args: Any, random_ltd: RandomLTD) -> None:
    """Take over what the policy had learned when a checkpoint was saved."""
    state = getattr(checkpoint_args, _STATE, None)
    if state is not None:
        random_ltd.load_policy_state(state)
