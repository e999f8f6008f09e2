"""``python -m megatron_rltd check --against PATH``: what another Megatron changed of what we touch.

Sources are read, not imported: the other Megatron may need packages that are not installed.
"""

import ast
import difflib
from collections.abc import Iterable
from pathlib import Path

from megatron_rltd.patching import mechanism, versions
from megatron_rltd.patching.mechanism import Patch

_VERSION_FILE = "megatron/core/package_info.py"


def find_source(root: Path, target: str) -> str | None:
    """Return the source text of a function or method below a folder.

    Args:
        root: The folder that holds the ``megatron`` package.
        target: ``"package.module:function"`` or ``"package.module:Class.method"``.

    Returns:
        The text with decorators, as `inspect.getsource` returns it, also where the module only
        imports the function from another one of Megatron. None if there is no such function.
    """
    module, _, path = target.partition(":")
    base = root.joinpath(*module.split("."))
    file = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
    if not file.is_file():
        return None
    text = file.read_text()
    scope: ast.AST = ast.parse(text)
    for name in path.split("."):
        found = [node for node in ast.walk(scope) if getattr(node, "name", None) == name]
        defined = [node for node in found if isinstance(node, ast.ClassDef | ast.FunctionDef)]
        if not defined:
            origin = _imported_from(scope, name)
            return find_source(root, f"{origin}:{path}") if origin else None
        scope = defined[0]
    if not isinstance(scope, ast.FunctionDef):
        return None
    first = min([scope.lineno, *(node.lineno for node in scope.decorator_list)])
    return "\n".join(text.splitlines()[first - 1 : scope.end_lineno])


def _imported_from(module: ast.AST, name: str) -> str | None:
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            if any((alias.asname or alias.name) == name == alias.name for alias in node.names):
                return node.module
    return None


def read_version(root: Path) -> str:
    """Return the version of the Megatron below a folder, such as "0.20.0".

    Raises:
        VersionError: There is no Megatron.
    """
    file = root / _VERSION_FILE
    if not file.is_file():
        raise versions.VersionError(
            f"there is no {file}: give --against the folder that holds Megatron's megatron package"
        )
    numbers = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    return ".".join(str(numbers[part]) for part in ("MAJOR", "MINOR", "PATCH"))


def compare(root: Path, installed: Path, rows: Iterable[Patch]) -> tuple[str, int]:
    """Compare the functions of a table in two Megatrons.

    Args:
        root: The folder of the other Megatron.
        installed: The folder of the Megatron in use.
        rows: The functions.

    Returns:
        The report, with the diff of each function that is not as in any tested version, and how
        many these are.
    """
    tested = versions.known_fingerprints()
    lines, changed = [], 0
    for target in dict.fromkeys(row.target for row in rows):
        there, here = find_source(root, target), find_source(installed, target)
        there_hash = there and mechanism.hash_source(there)
        same = [v for v, tested_hash in tested.get(target, {}).items() if tested_hash == there_hash]
        if same or (target not in tested and there == here):
            lines.append(f"  {'as in ' + same[-1] if same else 'as in use':<12}  {target}")
            continue
        changed += 1
        lines.append(f"  {'CHANGED' if there else 'GONE':<12}  {target}")
        if there and here:
            diff = difflib.unified_diff(
                here.splitlines(), there.splitlines(), "in use", "other", lineterm=""
            )
            lines += [f"    {line}" for line in diff]
    return "\n".join(lines), changed
