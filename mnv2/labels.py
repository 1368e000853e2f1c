"""From the names of classes to the numbers of the network's outputs."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources

from .errors import InputError

BACKGROUND = "background"  # the class that TensorFlow's networks have before ImageNet's
# What the outputs of networks for ImageNet-1k are: its 1000 classes, or 1001 with one more.
IMAGENET, BACKGROUND_FIRST, LAST_UNUSED = "imagenet", "background first", "last unused"
_WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class ClassIndex:
    """The number of each class by its name, and the words that say where the numbers come from.

    ``guessed`` where nothing but the data's own folders told them.
    """

    numbers: dict[str, int]
    source: str
    guessed: bool = False

    def __len__(self) -> int:
        """Outputs that a network needs for these classes."""
        return max(self.numbers.values()) + 1

    def check(self, found: Sequence[str]) -> None:
        """Raise InputError unless each of the classes called ``found`` has a number."""
        unknown = [name for name in found if name not in self.numbers]
        if unknown:
            raise InputError(
                f"--class_index: {self.source} gives {len(self.numbers)} classes, and {unknown[0]!r} is not among them"
                + (f" ({len(unknown)} such classes)" if len(unknown) > 1 else "")
            )

    def names(self, num_classes: int) -> list[str]:
        """Names by number, empty for a number without a class."""
        by_number = {number: name for name, number in self.numbers.items()}
        return [by_number.get(number, "") for number in range(num_classes)]

    def labels(self, names: Sequence[str]) -> list[int]:
        """Numbers of the classes called ``names``."""
        return [self.numbers[name] for name in names]


@cache
def imagenet_classes() -> tuple[tuple[str, str], ...]:
    """WordNet id and English names of ImageNet-1k's classes 0 to 999."""
    text = resources.files(__package__).joinpath("imagenet_classes.tsv").read_text(encoding="utf-8")
    rows = [line.split("\t") for line in text.splitlines()]
    return tuple((identifier, names) for _, identifier, names in rows)


@cache
def imagenet_orders() -> dict[str, list[str]]:
    """The classes by number in each of the orders that networks for ImageNet-1k have: WordNet ids, empty for none."""
    identifiers = [identifier for identifier, _ in imagenet_classes()]
    return {IMAGENET: identifiers, BACKGROUND_FIRST: [BACKGROUND, *identifiers], LAST_UNUSED: [*identifiers, ""]}


def class_names(outputs: int, trained: Sequence[str] | None) -> list[str]:
    """What a reader calls each of a network's classes.

    The names that the weights recorded, in English where they are ImageNet's WordNet ids; ImageNet's where nothing is
    recorded and there are 1000 outputs; else, and for a number without a class, the number.
    """
    if trained is None and outputs == len(imagenet_classes()):
        trained = [identifier for identifier, _ in imagenet_classes()]
    english = dict(imagenet_classes())
    recorded = trained or [""] * outputs
    return [english.get(name, name) or str(number) for number, name in enumerate(recorded)]


def class_index(
    rule: str,
    found: Sequence[str],
    *,
    trained: Sequence[str] | None = None,
    folders: Sequence[str] = (),
    outputs: int | None = None,
    record: str = "the weights' own record",
) -> ClassIndex:
    """Number the classes ``found`` in the data.

    Args:
        rule: "folders" numbers the sorted names; "imagenet" takes ImageNet-1k's own numbers for WordNet ids; any other
            word than "auto" is a file with one class a line, or with columns of number and name. "auto" takes the
            classes that the weights were ``trained`` on where they are recorded, ImageNet's numbers where every class
            is one of its WordNet ids and the network has 1000 outputs, and the sorted names otherwise.
        found: names of the classes in the data.
        trained: names of the classes that the weights were trained on, by number, where known.
        folders: names of the training classes beside the data; where there are any, "folders" numbers these, so that a
            validation set that lacks a class still agrees with training.
        outputs: outputs of the network, where known.
        record: what tells the ``trained`` classes, in words.

    Raises:
        InputError: a class has no number under the rule, or the file can't be used.
    """
    imagenet = {identifier: number for number, (identifier, _) in enumerate(imagenet_classes())}
    guessed = False
    if rule == "auto":
        if trained is not None:
            rule = "trained"
        elif outputs == len(imagenet) and all(name in imagenet for name in found):
            rule = "imagenet"
        else:
            rule, guessed = "folders", True
    elif rule not in ("folders", "imagenet"):
        return _checked(_read_index(rule), f"the file {rule}", found)
    if rule == "trained":
        assert trained is not None
        return _checked({name: number for number, name in enumerate(trained) if name}, record, found)
    if rule == "imagenet":
        return _checked(imagenet, "ImageNet-1k's own order of its WordNet ids", found)
    names = sorted(folders or found)
    source = "the sorted class folders" + (" of train/" if folders else "")
    return replace(_checked({name: number for number, name in enumerate(names)}, source, found), guessed=guessed)


def _checked(numbers: dict[str, int], source: str, found: Sequence[str]) -> ClassIndex:
    index = ClassIndex(numbers, source)
    index.check(found)
    return index


def _read_index(path: str) -> dict[str, int]:
    rows = [re.split(r"[\t,]", line) for line in _read_lines("--class_index", path)]
    rows = [[cell.strip() for cell in row] for row in rows]
    if all(len(row) > 1 and row[0].isdecimal() for row in rows):
        pairs = [(row[1], int(row[0])) for row in rows]
    elif all(len(row) == 2 and row[1].isdecimal() for row in rows):
        pairs = [(row[0], int(row[1])) for row in rows]
    elif all(len(row) == 1 for row in rows):
        pairs = [(row[0], number) for number, row in enumerate(rows)]
    else:
        pairs = []
    numbers = dict(pairs)
    if not numbers or len(numbers) < len(pairs) or len(set(numbers.values())) < len(pairs):
        raise InputError(
            f"--class_index: expected one class a line, or a number and a class in every line, each once, in {path}"
        )
    return numbers


def read_labels(path: str, files: Sequence[str]) -> dict[str, str]:
    """Class by file name, from a file with a name and a class in each line.

    The columns are parted by a tab, a comma or a space; a heading is passed over. A name may lack its extension, and
    what follows a WordNet id doesn't count, so Kaggle's ``LOC_val_solution.csv`` is read as it is.

    Args:
        path: the file.
        files: names of the pictures at hand; names in the file that match none of them stay as they are.

    Raises:
        InputError: the file can't be read, a line has one column only, or a picture has two classes.
    """
    by_stem = {os.path.splitext(file)[0]: file for file in files}
    known = {*files, *by_stem}
    classes: dict[str, str] = {}
    for number, line in enumerate(_read_lines("--val_labels", path), 1):
        mark = "\t" if "\t" in line else "," if "," in line else " "
        name, _, rest = line.partition(mark)
        name, rest = os.path.basename(name.strip()), rest.strip()
        identifier = _WORDNET_ID.match(rest)
        if number == 1 and not (name in known or identifier or "." in name):
            continue  # a heading
        label = identifier.group() if identifier else rest.partition(mark)[0].strip()
        if not name or not label:
            raise InputError(f"--val_labels: expected a name and a class in line {number} of {path}, got {line!r}")
        name = by_stem.get(name, name)
        if classes.setdefault(name, label) != label:
            raise InputError(f"--val_labels: {path} gives {name} two classes, {classes[name]} and {label}")
    return classes


def _read_lines(flag: str, path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file]
    except OSError as error:
        raise InputError(f"{flag}: can't read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{flag}: expected a text file, got {path}") from None
    return [line for line in lines if line]
