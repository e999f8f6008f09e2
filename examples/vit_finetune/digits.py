"""Write scikit-learn's handwritten digits as images: FOLDER/train/0/0000.png, FOLDER/val/...

    python examples/vit_finetune/digits.py FOLDER

These are 1,797 real images of 8 * 8 gray pixels, which come with the package. Every fifth is for
validation.
"""

import sys
from pathlib import Path

import numpy as np


def write(folder: Path) -> None:
    """Write the images; the folder appears when it is complete."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits, part = load_digits(), folder.with_name(folder.name + ".part")
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = part / ("val" if number % 5 == 4 else "train") / str(label) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype(np.uint8)).save(path)
    part.rename(folder)


def main(arguments: list[str]) -> int:
    """Write the digits; return the exit status."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        write(Path(arguments[0]))
    except ImportError as error:
        print(f"digits.py: {error}: pip install scikit-learn pillow", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
