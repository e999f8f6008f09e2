"""The signatures of Transformer Engine, and of Megatron's functions on it, that random-LTD meets.

    python -m tests.megatron.te_signatures            # how the one installed differs from the file
    python -m tests.megatron.te_signatures --write    # rewrite tests/golden/transformer_engine.json

The golden file is made where Transformer Engine is installed; where it is not, the tests hold what
random-LTD passes on against it.
"""

import argparse
import importlib
import importlib.metadata
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[1] / "golden" / "transformer_engine.json"
_MEGATRON = "megatron.core.extensions.transformer_engine"
ROTARY = f"{_MEGATRON}:fused_apply_rotary_pos_emb"
CHECKPOINT = f"{_MEGATRON}:te_checkpoint"
ATTENTION = f"{_MEGATRON}:TEDotProductAttention.forward"
TE_ROTARY = "transformer_engine.pytorch.attention.rope:apply_rotary_pos_emb"
TE_CHECKPOINT = "transformer_engine.pytorch.distributed:checkpoint"
TE_ATTENTION = "transformer_engine.pytorch:DotProductAttention.forward"
NAMES = (ROTARY, CHECKPOINT, ATTENTION, TE_ROTARY, TE_CHECKPOINT, TE_ATTENTION)


def golden() -> dict[str, Any]:
    """Return the golden file."""
    return json.loads(GOLDEN.read_text())


def signature(name: str) -> inspect.Signature:
    """Return a signature of the golden file; parameters that have a default have Ellipsis."""
    made: dict[str, Any] = {}
    exec(f"def function{golden()['signatures'][name]}: ...", made)
    return inspect.signature(made["function"])


def _find(name: str) -> Callable:
    module, path = name.split(":")
    found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _as_text(function: Callable) -> str:
    """Return a signature without types, and with "..." for every default."""
    parameters = [
        parameter.replace(
            annotation=parameter.empty,
            default=parameter.empty if parameter.default is parameter.empty else ...,
        )
        for parameter in inspect.signature(function).parameters.values()
    ]
    return str(inspect.Signature(parameters)).replace("Ellipsis", "...")


def installed() -> dict[str, Any]:
    """Return what the golden file would be for the packages installed here."""
    import torch  # noqa: F401  # first: it loads what Transformer Engine is linked to

    return {
        "transformer_engine": importlib.metadata.version("transformer-engine"),
        "megatron_core": importlib.metadata.version("megatron-core"),
        "signatures": {name: _as_text(_find(name)) for name in NAMES},
    }


def main() -> None:
    """Compare the golden file with what is installed, and rewrite it if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"rewrite {GOLDEN.name}")
    args = parser.parse_args()
    try:
        now = installed()
    except importlib.metadata.PackageNotFoundError as error:
        raise SystemExit(f"{error}: install Transformer Engine and Megatron-core first") from None
    before = golden() if GOLDEN.exists() else {"signatures": {}}
    rows = [(key, before.get(key), now[key]) for key in ("transformer_engine", "megatron_core")]
    rows += [(n, before["signatures"].get(n), now["signatures"][n]) for n in NAMES]
    changes = [f"{name}\n  - {a}\n  + {b}" for name, a, b in rows if a != b]
    print("\n".join(changes) or "no difference")
    if args.write:
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(now, indent=1) + "\n")


if __name__ == "__main__":
    main()
