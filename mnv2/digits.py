"""The embedded data set: scikit-learn's 1,797 handwritten digits, written as a folder of pictures.

    python -m mnv2.digits DIR

makes ``DIR/train`` and ``DIR/val`` with a folder for each digit, grey PNGs of 40 by 40 pixels.

Source: Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import numpy as np

SCALE = 4  # an 8 by 8 digit becomes 32 by 32 pixels ...
BORDER = 4  # ... inside a border that centre crops may take away
VALIDATION = 5  # every fifth picture


def write(folder: str) -> tuple[int, int]:
    """Write the data set to ``folder`` and return the numbers of training and validation pictures.

    The same pictures each time; files that are there already are overwritten.
    """
    try:
        from PIL import Image
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f"the digits need the extra 'demo' ({error}): pip install 'mnv2[demo]'") from error
    digits = load_digits()
    counts = {"train": 0, "val": 0}
    for number, (picture, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "val" if number % VALIDATION == 0 else "train"
        pixels = np.kron(picture * (255 / 16), np.ones((SCALE, SCALE))).round().astype(np.uint8)
        place = os.path.join(folder, split, str(label))
        os.makedirs(place, exist_ok=True)
        Image.fromarray(np.pad(pixels, BORDER)).save(os.path.join(place, f"{number:04d}.png"))
        counts[split] += 1
    return counts["train"], counts["val"]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: write the data set to the folder that is named."""
    parser = argparse.ArgumentParser(prog="python -m mnv2.digits", description="Write the embedded data set.")
    parser.add_argument("folder", metavar="DIR", help="where train/ and val/ are made")
    folder = parser.parse_args(argv).folder
    try:
        train, val = write(folder)
        print(f"{folder}: {train} pictures to train on and {val} to validate, 10 classes", flush=True)
    except (ImportError, OSError) as error:
        print(f"mnv2.digits: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
