"""Faults put into our code while it runs on the GPU that is made up: each must be found."""

import ast
import contextlib
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Fault:
    """A statement at the beginning of one of our functions.

    Attributes:
        function: "module:name" or "module:class.name", of megatron_rltd.
        statement: It may use the function's arguments.
        found: What the guard must say of it.
        seen_in: The function that it must say it of, if it is another.
    """

    function: str
    statement: str
    found: str
    seen_in: str = ""


IN_BLOCK, SUBSAMPLE = "model.block:plan_recomputation", "model.layer:subsample"
KEPT = "next(iter(kept.values())).rows"
WAITS, COPIES = "waits for the GPU", "copies from the GPU"
ON_CPU = "a tensor on the CPU"

FAULTS: dict[str, Fault] = {
    "item": Fault(IN_BLOCK, f"{KEPT}.max().item()", WAITS),
    "int": Fault(IN_BLOCK, f"int({KEPT}[0, 0])", WAITS),
    "if": Fault(IN_BLOCK, f"if {KEPT}.max() > 3: pass", WAITS),
    "index": Fault(IN_BLOCK, f"[0] * 99 and list(range(99))[{KEPT}[0, 0]]", WAITS),
    "tolist": Fault(IN_BLOCK, f"{KEPT}.tolist()", WAITS),
    "cpu": Fault(IN_BLOCK, f"{KEPT}.cpu()", COPIES),
    "to cpu": Fault(IN_BLOCK, f"{KEPT}.to('cpu', non_blocking=True)", COPIES),
    "item of the first only": Fault(SUBSAMPLE, "kept.rows[0, 0].item()", WAITS),
    "swallowed": Fault(IN_BLOCK, f"try: {KEPT}.max().item()\nexcept BaseException: pass", WAITS),
    "list to the device": Fault(
        SUBSAMPLE,
        "import torch; torch.tensor([0, 1], device=kept.rows.device)",
        ON_CPU,
    ),
    "list to cuda": Fault(SUBSAMPLE, "import torch; torch.tensor([0, 1]).to('cuda')", ON_CPU),
    "new_tensor": Fault(SUBSAMPLE, "kept.rows.new_tensor([0, 1])", ON_CPU),
    "pinned": Fault(
        SUBSAMPLE,
        "import torch; torch.arange(2).pin_memory().cuda(non_blocking=True)",
        ON_CPU,
    ),
    "list as index": Fault(SUBSAMPLE, "kept.rows[:, [0, 1]]", ON_CPU),
    "index on the CPU": Fault(SUBSAMPLE, "import torch; kept.rows[:, torch.arange(2)]", ON_CPU),
    "samples on the CPU": Fault(
        "model.kept:sample_indices",
        "import torch; device = torch.device('cpu')",
        ON_CPU,
        "tokens.ops:sample_positions",
    ),
    "boolean mask": Fault(SUBSAMPLE, "kept.rows[kept.rows > 3]", WAITS),
    "masked_select": Fault(SUBSAMPLE, "kept.rows.masked_select(kept.rows > 3)", WAITS),
    "nonzero": Fault(SUBSAMPLE, "(kept.rows > 3).nonzero()", WAITS),
    "unique": Fault(SUBSAMPLE, "kept.rows.unique()", WAITS),
    "repeats": Fault(SUBSAMPLE, "kept.rows[0].repeat_interleave(kept.rows[0])", WAITS),
    "equal": Fault(SUBSAMPLE, "kept.rows.equal(kept.local)", WAITS),
    "printed": Fault(SUBSAMPLE, "str(kept.rows)", "prints a tensor"),
    "synchronize": Fault(SUBSAMPLE, "import torch; torch.cuda.synchronize()", WAITS),
    "synchronize any": Fault(SUBSAMPLE, "import torch; torch.accelerator.synchronize()", WAITS),
    "array": Fault(
        SUBSAMPLE,
        "import numpy, torch\ntorch.from_numpy(numpy.arange(3)).to(kept.rows.device)",
        ON_CPU,
    ),
    "collective": Fault(
        SUBSAMPLE,
        "import torch; torch.distributed.all_reduce(kept.rows)",
        "other ranks",
    ),
    "stream": Fault(SUBSAMPLE, "import torch; torch.cuda.current_stream().synchronize()", WAITS),
    "empty_cache": Fault(SUBSAMPLE, "import torch; torch.cuda.empty_cache()", WAITS),
    "in recomputation only": Fault(
        SUBSAMPLE,
        "import torch\nif torch.is_grad_enabled(): kept.rows.max().item()",
        WAITS,
    ),
    "in backward of split": Fault("tokens.ops:_Split.backward", "grad_tokens.sum().item()", WAITS),
    "in backward of exchange": Fault("tokens.ops:_Exchange.backward", "grad_next.cpu()", COPIES),
    "in backward of merge": Fault(
        "tokens.ops:_Merge.backward", "import torch; torch.tensor([1], device=grad.device)", ON_CPU
    ),
    "in torch's own backward": Fault(
        "model.layer:run_layer",
        "x = kwargs['hidden_states']\nkwargs['hidden_states'] = x + x.mean().to('cpu').to('cuda')",
        COPIES,
    ),
    "in a data structure of Megatron's": Fault(
        SUBSAMPLE,
        "import torch\nfrom megatron.core.packed_seq_params import PackedSeqParams\n"
        "offsets = torch.arange(3, device=kept.rows.device)\n"
        "PackedSeqParams('thd', offsets, offsets, total_tokens=9)",
        WAITS,
    ),
    "tokens on the CPU": Fault(
        "model.block:BorrowedRows.borrow", "indices = indices.cpu()", COPIES
    ),
    "buffer not contiguous": Fault(
        "tokens.ops:_Merge.forward", "buffer = buffer.transpose(0, 1)", "not contiguous"
    ),
}


@contextlib.contextmanager
def put(fault: Fault) -> Iterator[None]:
    """Put a fault into the function of the module's file, for the length of a with-statement."""
    module_name, path = fault.function.split(":")
    module = importlib.import_module(f"megatron_rltd.{module_name}")
    *classes, name = path.split(".")
    owner: Any = getattr(module, classes[0]) if classes else module
    file = str(module.__file__)
    node: Any = ast.parse(Path(file).read_text())
    for part in (*classes, name):
        node = next(n for n in node.body if getattr(n, "name", None) == part)
    added = ast.parse(fault.statement).body
    for statement in added:
        for part in ast.walk(statement):
            if hasattr(part, "lineno"):
                part.lineno = part.end_lineno = node.body[0].lineno
    node.body = [*added, *node.body]
    made: dict[str, Any] = {}
    exec(compile(ast.Module([node], []), file, "exec"), vars(module), made)
    original = vars(owner)[name]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(owner, name, made[name]))
        for other in _modules():  # that have imported it by name
            if not classes and vars(other).get(name) is original:
                stack.enter_context(mock.patch.object(other, name, made[name]))
        yield


def _modules() -> list[Any]:
    return [m for name, m in list(sys.modules.items()) if name.split(".")[0] == "megatron_rltd"]
