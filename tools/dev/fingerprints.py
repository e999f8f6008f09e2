"""Add the installed Megatron's fingerprints to megatron_rltd/patching/fingerprints.json.

python tools/dev/fingerprints.py            print what would be stored
python tools/dev/fingerprints.py --write    store it, after the tests pass with this version
"""

import argparse
import inspect
import json
from pathlib import Path

from megatron_rltd.patching import versions
from megatron_rltd.patching.mechanism import fingerprint
from megatron_rltd.training import patches
from megatron_rltd.training.state import Training

STORE = Path(versions.__file__).parent / "fingerprints.json"


def fingerprints() -> dict[str, str]:
    """Return {symbol: fingerprint} of each function that random-LTD wraps or relies on."""
    found = {}
    for row in versions.rows_for_release(versions.RELIED_ON + patches.patches_of(Training())):
        _, _, original = row.resolve()
        if inspect.isfunction(inspect.unwrap(original)) if original is not None else False:
            found[row.target] = fingerprint(original)
    return found


def main() -> None:
    """Print or store the fingerprints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="update the stored file")
    write = parser.parse_args().write
    stored = json.loads(STORE.read_text()) if STORE.exists() else {}
    for symbol, value in fingerprints().items():
        stored.setdefault(symbol, {})[versions.megatron_version()] = value
        print(f"{value}  {symbol}")
    if write:
        STORE.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
