"""Replace attributes of imported modules: resolve every one, check every one, then apply.

Knows nothing of Megatron or random-LTD. A `Patch` is data; `apply` either applies all of them or
raises `PatchError` having touched nothing; the `AppliedPatches` it returns puts the originals back.

    applied = apply([Patch("package.module:Class.method", wrapper, "why")])
    ...
    applied.revert()
"""

import hashlib
import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


class PatchError(RuntimeError):
    """A patch does not fit the module it is meant for. Nothing has been applied."""


@dataclass(frozen=True)
class Patch:
    """One attribute to replace.

    Attributes:
        target: ``"package.module:attribute"`` or ``"package.module:Class.attribute"``.
        wrapper: It is called once with the original and returns the replacement.
        reason: Why this symbol, in one sentence; printed in the table of patches.
        parameters: Names of the target's parameters that the wrapper relies on.
        copies: Packages in which modules may hold the original under the same name and keep it.
            In any other module such a copy is an error, because it would bypass the patch. ""
            allows all modules.
        create: The attribute need not exist; the wrapper then gets None, and `revert` deletes it.
        since, before: Releases of the target's package that the row is for, as (major, minor):
            `since` is the first, `before` the first that is too new. Default: all.
    """

    target: str
    wrapper: Callable[[Any], Any] = field(compare=False)  # so that a new one is no new patch
    reason: str
    parameters: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    create: bool = False
    since: tuple[int, ...] = ()
    before: tuple[int, ...] = ()

    def is_for(self, release: tuple[int, ...]) -> bool:
        """Return whether the row is for a release, (major, minor), of the target's package."""
        return self.since <= release and (not self.before or release < self.before)

    def resolve(self) -> tuple[Any, str, Any]:
        """Return (object that owns the attribute, attribute name, original value)."""
        module_name, _, path = self.target.partition(":")
        try:
            owner = importlib.import_module(module_name)
            *parents, name = path.split(".")
            for parent in parents:
                owner = getattr(owner, parent)
            # A class attribute is taken from the class itself, so that staticmethods stay
            # staticmethods and `revert` does not turn an inherited attribute into an own one.
            inherited = getattr(owner, name, None) if self.create else getattr(owner, name)
            original = vars(owner).get(name, inherited)
        except (ImportError, AttributeError) as error:
            raise PatchError(f"{self.target} does not exist: {error}") from error
        return owner, name, original


class AppliedPatches:
    """The patches that one call of `apply` put in force.

    Attributes:
        patches: Those that replaced something: a wrapper may return the original.
    """

    def __init__(self) -> None:
        self.patches: tuple[Patch, ...] = ()
        self._undo: list[Callable[[], None]] = []

    def on_revert(self, undo: Callable[[], None]) -> None:
        """Make `revert` call `undo`, before functions that were registered earlier."""
        self._undo.append(undo)

    def revert(self) -> None:
        """Put every original back, newest first. Reverting twice is harmless."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()


# Every patch applied and not reverted, so that none is applied twice.
_IN_FORCE: list[Patch] = []


def _replace(patch: Patch, applied: AppliedPatches) -> None:
    owner, name, original = patch.resolve()
    owned = name in vars(owner)
    replacement = patch.wrapper(original)
    if replacement is original:
        return
    applied.patches += (patch,)
    setattr(owner, name, replacement)
    _IN_FORCE.append(patch)

    def undo() -> None:
        if vars(owner).get(name) is not replacement:
            raise PatchError(f"{patch.target} was patched again later: revert that patch first")
        if owned:
            setattr(owner, name, original)
        else:
            delattr(owner, name)
        _IN_FORCE.remove(patch)

    applied.on_revert(undo)


def describe(patches: Iterable[Patch]) -> str:
    """Return the table of patches as text, with the targets that share a reason together."""
    targets: dict[str, list[str]] = {}
    for patch in patches:
        targets.setdefault(patch.reason, []).append(patch.target)
    alone = [names[0] for names in targets.values() if len(names) == 1]
    width = max(map(len, alone), default=0)
    lines = []
    for reason, names in targets.items():
        if len(names) == 1:
            lines.append(f"  {names[0]:<{width}}  {reason}")
        else:
            text = ", ".join(names)
            lines.append(textwrap.fill(text, 98, initial_indent="  ", subsequent_indent="  "))
            lines.append(f"      {reason}")
    return "\n".join(lines)


def fingerprint(function: Any) -> str:
    """Return 16 hex digits of the SHA-256 of a function's source text, docstring and all."""
    return hash_source(inspect.getsource(inspect.unwrap(function)))


def hash_source(source: str) -> str:
    """Return the `fingerprint` of a function from its source text."""
    text = "\n".join(line.rstrip() for line in source.strip().splitlines())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def find_problems(patch: Patch, tested: Mapping[str, Iterable[str]]) -> list[str]:
    """Return what is wrong with `patch` in this process, as sentences; none if all is well.

    Args:
        tested: Target to the fingerprints it was tested with. A target that is absent from it is
            not fingerprinted (a C function has no source, say).
    """
    try:
        _, name, original = patch.resolve()
    except PatchError as error:
        return [str(error)]
    problems = []
    if patch in _IN_FORCE:
        return [f"{patch.target} is already patched"]
    if patch.parameters:
        missing = set(patch.parameters) - set(inspect.signature(original).parameters)
        if missing:
            problems.append(f"{patch.target} has no parameter {', '.join(sorted(missing))}")
    if patch.target in tested:
        found = fingerprint(original)
        if found not in tested[patch.target]:
            problems.append(f"{patch.target} has source fingerprint {found}, which is not tested")
    module_name = patch.target.partition(":")[0]
    if callable(original) and "." not in patch.target.partition(":")[2]:
        allowed = tuple(prefix and f"{prefix}." for prefix in (module_name, *patch.copies))
        for other_name, other in list(sys.modules.items()):
            is_copy = getattr(other, "__dict__", {}).get(name) is original
            if is_copy and not f"{other_name}.".startswith(allowed):
                problems.append(
                    f"{other_name} imported {patch.target} by name before it could be patched"
                )
    return problems


def apply(
    patches: Iterable[Patch], tested: Mapping[str, Iterable[str]] | None = None
) -> AppliedPatches:
    """Apply all patches or none.

    Args:
        patches: Applied in this order.
        tested: See `find_problems`.

    Raises:
        PatchError: It names every patch that does not fit. Nothing has been applied.
    """
    patches = tuple(patches)
    targets = [patch.target for patch in patches]
    problems = [
        f"{t} is listed twice" for t in sorted({t for t in targets if targets.count(t) > 1})
    ]
    for patch in patches:
        problems += find_problems(patch, tested or {})
    if problems:
        raise PatchError("; ".join(problems))
    applied = AppliedPatches()
    try:
        for patch in patches:
            _replace(patch, applied)
    except BaseException:
        applied.revert()
        raise
    return applied
