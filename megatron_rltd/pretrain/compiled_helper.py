"""Megatron's compiled data set helper, ``megatron.core.datasets.helpers_cpp``, from its wheel.

Megatron compiles it with make at start-up, on rank 0. The megatron-core wheel holds it compiled and
no Makefile; a clone of Megatron-LM holds the Makefile, which needs pybind11 and a python3-config of
the very Python that runs.
"""

import functools
import importlib.util
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from megatron_rltd.patching import mechanism
from megatron_rltd.patching.mechanism import AppliedPatches, Patch

_NAME = "megatron.core.datasets.helpers_cpp"


def is_importable() -> bool:
    """Return whether the helper can be imported, from wherever Megatron is imported from."""
    try:
        importlib.import_module(_NAME)
    except ImportError:
        return False
    return True


def can_be_made() -> bool:
    """Return whether the Megatron in use has the Makefile, so is a clone of Megatron-LM."""
    import megatron.core.datasets

    return (Path(megatron.core.datasets.__file__).parent / "Makefile").exists()


def load() -> None:
    """Make the helper importable from the installed wheel, if it is not importable already."""
    if is_importable():
        return
    folder = Path(sysconfig.get_paths()["purelib"], *_NAME.split(".")[:-1])
    file = folder / ("helpers_cpp" + sysconfig.get_config_var("EXT_SUFFIX"))
    spec = importlib.util.spec_from_file_location(_NAME, file) if file.exists() else None
    if spec and spec.loader:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[_NAME] = module


def _compile_helpers(original: Callable) -> Callable:
    @functools.wraps(original)
    def compile_helpers():
        if not is_importable():
            original()

    return compile_helpers


PATCHES: tuple[Patch, ...] = (
    Patch(
        "megatron.core.datasets.utils:compile_helpers",
        _compile_helpers,
        "runs make at start-up; a wheel brings the compiled helper and no Makefile",
    ),
)


def use(even_in_clone: bool) -> AppliedPatches:
    """Let Megatron's data sets use the compiled helper of the megatron-core wheel.

    This is done with and without random-LTD, if Megatron's own way to the helper cannot work.

    Args:
        even_in_clone: Do it also in a clone of Megatron-LM, where Megatron would compile it.
    """
    wanted = even_in_clone or not can_be_made()
    if wanted:
        load()
    return mechanism.apply(PATCHES if wanted else ())
