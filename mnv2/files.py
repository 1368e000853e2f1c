"""What pictures a run sees, the class that each is of, and what is left out.

The files are listed and checked here, before any decoder meets them: their order is ours, every picture has a number,
and whatever isn't used is reported.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from .config import RunConfig
from .distributed import World
from .errors import InputError
from .integrity import fault
from .labels import ClassIndex, class_index, read_labels
from .weights import Weights

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".pnm", ".ppm", ".pgm", ".pbm", ".jp2")
SHOWN = 10
_STDIN = "-"


@dataclass(frozen=True)
class Pictures:
    """The pictures of one folder: picture i is the file ``paths[i]``, of the class called ``names[i]``.

    ``classes`` are the names of all classes found, sorted, those without pictures included. ``problems`` are pairs of
    a path and what is wrong with it. ``passed_over`` counts by extension the files that are no pictures. ``checked``
    ones went through ``check_pictures``.
    """

    folder: str
    paths: list[str]
    names: list[str]
    classes: list[str]
    problems: list[tuple[str, str]] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    checked: bool = False

    def __len__(self) -> int:
        return len(self.paths)

    def listing(self) -> dict[str, Any]:
        """Number of pictures and SHA-256 of their order, files and classes; the same wherever the folder lies."""
        digest = hashlib.sha256()
        for path, name in zip(self.paths_below(), self.names, strict=True):
            digest.update(f"{path}\0{name}\0".encode("utf-8", "surrogateescape"))
        return {"pictures": len(self), "sha256": digest.hexdigest()}

    def paths_below(self) -> list[str]:
        """The paths as seen from the folder."""
        start = len(os.path.join(self.folder, ""))
        return [path[start:] for path in self.paths]


def list_pictures(data_url: str, split: str, val_labels: str | None = None) -> Pictures:
    """List the pictures under ``data_url/split``, sorted by path.

    Every folder in it is a class, whose pictures may lie in folders of their own. A flat ``split``, one without class
    folders, needs the file ``val_labels``, which tells the class of each picture (see ``labels.read_labels``).

    Raises:
        InputError: the folder is missing or holds no pictures, or it is flat and there is no ``val_labels``.
    """
    if not os.path.isdir(data_url):
        raise InputError(
            f"--data_url: no folder {data_url}; it should hold train/ and val/, each with one folder of pictures a "
            "class. To try without one: `python -m mnv2.digits DIR` writes the embedded data set for --data_url DIR, "
            "and --synthetic makes pictures up"
        )
    folder = os.path.join(data_url, split)
    if not os.path.isdir(folder):
        raise InputError(f"--data_url: expected a folder {split}/ in {data_url}, which holds {_contents(data_url)}")
    classes = class_folders(data_url, split)
    if val_labels is not None:
        pictures = _list_flat(folder, val_labels)
    elif classes:
        pictures = _list_classes(folder, classes)
    elif pictures_below(folder, Counter()):
        raise InputError(
            f"--val_labels: expected a file that tells the classes of the pictures in {folder}, which has no class "
            "folders (or sort them into one folder a class)"
        )
    else:
        pictures = Pictures(folder, [], [], [])
    if not pictures.paths:
        raise InputError(f"--data_url: expected pictures in {folder}, which holds {_contents(folder)}")
    return pictures


def class_folders(data_url: str, split: str) -> list[str]:
    """Sorted names of the class folders in ``data_url/split``; none where there is no such folder."""
    folder = os.path.join(data_url, split)
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def prepare(
    pictures: Pictures, config: RunConfig, world: World, weights: Weights | None = None
) -> tuple[Pictures, ClassIndex, int]:
    """Number the classes of ``pictures`` and check every file, as ``config`` says; prints what was decided.

    Args:
        pictures: what ``list_pictures`` found.
        config: the run.
        world: the processes.
        weights: what the network is, or starts from with its classifier, where there is something.

    Returns:
        The pictures that are used, the numbers of their classes, and the outputs of the network.

    Raises:
        InputError: a class has no number, the network too few outputs, or a file is bad (see ``check_pictures``).
    """
    outputs = config.num_classes or (weights.num_classes if weights else None)
    index = class_index(
        config.class_index,
        pictures.classes,
        trained=weights.classes if weights else None,
        folders=class_folders(config.data_url, "train"),
        outputs=outputs,
        record=f"usual for {weights.source}" if weights and "classes" in weights.assumed else "the weights' own record",
    )
    outputs = outputs or len(index)
    if outputs < len(index):
        whose = "--num_classes" if config.num_classes else "--pretrained"
        raise InputError(f"{whose}: expected at least {len(index)} classes for {index.source}, got {outputs}")
    if weights and weights.classes is None and index.guessed and outputs != len(index):
        raise InputError(
            f"--class_index: expected folders, imagenet or a FILE, since {weights.path} has {outputs} outputs and the "
            f"data {len(index)} classes, so that their numbers can't be guessed"
        )
    pictures = check_pictures(pictures, config.bad_files, world)
    world.print(f"class numbers: {index.source}")
    trained = {name: number for number, name in enumerate(weights.classes or ()) if name} if weights else {}
    for name, number in index.numbers.items():
        if trained.get(name, number) != number:
            world.print(
                f"--class_index: {name} is {number} here, and {trained[name]} for the weights: mind the accuracy"
            )
            break
    return pictures, index, outputs


def check_pictures(pictures: Pictures, bad_files: str, world: World) -> Pictures:
    """Look into every file that isn't checked, each process into its share, and return the pictures that are whole.

    Prints how many pictures there are and everything that is left out.

    Raises:
        InputError: something is wrong and ``bad_files`` is "error", or nothing is left.
    """
    if pictures.checked:
        return pictures
    share = [fault(path) for path in pictures.paths[world.rank :: world.size]]
    found: list[str | None] = [None] * len(pictures)
    for rank, part in enumerate(world.gather(share)):
        found[rank :: world.size] = part
    problems = [*pictures.problems, *((path, bad) for path, bad in zip(pictures.paths, found, strict=True) if bad)]
    if problems and bad_files == "error":
        shown = "; ".join(f"{path} {problem}" for path, problem in problems[:SHOWN])
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise InputError(f"{shown}{more}. Mend or remove what is named, or leave it out with --bad_files skip")
    for path, problem in problems:
        world.print(f"left out: {path} {problem}")
    kept = [i for i, bad in enumerate(found) if not bad]
    if not kept:
        raise InputError(f"--data_url: expected pictures in {pictures.folder}, but all {len(found)} are damaged")
    world.print(
        f"{pictures.folder}: {len(kept)} pictures of {len(pictures.classes)} classes"
        + (f", {len(problems)} left out as named above" if problems else "")
        + passed_over_words(pictures.passed_over)
    )
    return replace(
        pictures,
        paths=[pictures.paths[i] for i in kept],
        names=[pictures.names[i] for i in kept],
        problems=problems,
        checked=True,
    )


def _list_classes(folder: str, classes: list[str]) -> Pictures:
    pictures = Pictures(folder, [], [], classes)
    for path in _pictures_in(folder, os.listdir(folder), pictures.passed_over):
        pictures.problems.append((path, "lies in no class folder"))
    for name in classes:
        found = pictures_below(os.path.join(folder, name), pictures.passed_over)
        if not found:
            pictures.problems.append((os.path.join(folder, name), "is a class without pictures"))
        pictures.paths.extend(found)
        pictures.names.extend([name] * len(found))
    return pictures


def _list_flat(folder: str, val_labels: str) -> Pictures:
    passed_over: Counter[str] = Counter()
    paths = pictures_below(folder, passed_over)
    classes = read_labels(val_labels, [os.path.basename(path) for path in paths])
    pictures = Pictures(folder, [], [], sorted(set(classes.values())), passed_over=passed_over)
    for path in paths:
        name = classes.pop(os.path.basename(path), None)
        if name is None:
            pictures.problems.append((path, f"has no class in {val_labels}"))
        else:
            pictures.paths.append(path)
            pictures.names.append(name)
    for file in classes:
        pictures.problems.append((os.path.join(folder, file), f"is named in {val_labels} but missing"))
    if paths and not pictures.paths:
        raise InputError(f"--val_labels: {val_labels} names none of the {len(paths)} pictures in {folder}")
    return pictures


def _refuse(error: OSError) -> None:
    raise InputError(f"--data_url: can't read {error.filename}: {error.strerror}")


def pictures_below(
    folder: str, passed_over: Counter[str], unreadable: Callable[[OSError], None] = _refuse
) -> list[str]:
    """The pictures in ``folder`` and in the folders below it, each in order; ``passed_over`` counts what isn't one.

    ``unreadable`` is told of each folder that can't be read.
    """
    found = []
    for place, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        kept = []
        for name in sorted(folders):
            if name.startswith("."):
                passed_over["hidden"] += 1
            elif _leads_up(os.path.join(place, name)):
                passed_over["link to a folder above"] += 1
            else:
                kept.append(name)
        folders[:] = kept
        found.extend(_pictures_in(place, files, passed_over))
    return found


def _leads_up(folder: str) -> bool:
    """Whether ``folder`` is a link to a folder that holds it, where a walk would never end."""
    if not os.path.islink(folder):
        return False
    target, place = os.path.realpath(folder), os.path.realpath(os.path.dirname(folder))
    return os.path.commonpath([target, place]) == target


def _pictures_in(folder: str, names: list[str], passed_over: Counter[str]) -> list[str]:
    found = []
    for name in sorted(names):
        path = os.path.join(folder, name)
        if name.startswith("."):
            passed_over["hidden"] += 1
        elif not name.isprintable() and "\\udc" in ascii(name):  # DALI takes names in UTF-8 only
            passed_over["whose name isn't UTF-8"] += 1
        elif name.lower().endswith(EXTENSIONS):
            found.append(path)
        elif not os.path.isdir(path):
            passed_over[os.path.splitext(name)[1].lower() or "without extension"] += 1
    return found


def passed_over_words(counts: Counter[str]) -> str:
    """What ``counts`` says to a reader; nothing where all were pictures."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common() if count)
    return f"; passed over as no pictures by name: {kinds}" if kinds else ""


def _contents(folder: str) -> str:
    names = sorted(os.listdir(folder))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more or "nothing"


class Picture(NamedTuple):
    """A file, and what the user calls it."""

    path: str
    name: str


class Problem(NamedTuple):
    """What is wrong with the picture or folder called ``name``."""

    name: str
    problem: str


def find_pictures(files: Sequence[str], folder: str) -> Iterator[Picture | Problem]:
    """The pictures that ``files`` name, checked, and what is wrong with the others; stdin's goes into ``folder``."""
    for name in files:
        if name == _STDIN:
            path = os.path.join(folder, "stdin")
            if os.path.exists(path):
                yield Problem(_STDIN, "was given before, and stdin holds one picture")
                continue
            with open(path, "wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
            yield _checked(Picture(path, _STDIN))
        elif os.path.isdir(name):
            passed_over: Counter[str] = Counter()
            unreadable: list[OSError] = []
            paths = pictures_below(name, passed_over, unreadable.append)
            yield from (Problem(str(error.filename), f"can't be read: {error.strerror}") for error in unreadable)
            if not paths and not unreadable:
                yield Problem(name, f"holds no pictures{passed_over_words(passed_over)}")
            for path in paths:
                yield _checked(Picture(path, path))
        else:
            yield _checked(Picture(name, name))


def _checked(picture: Picture) -> Picture | Problem:
    try:
        picture.path.encode()
    except UnicodeEncodeError:  # DALI takes no other
        return Problem(picture.name.encode(errors="backslashreplace").decode(), "has a name that isn't UTF-8")
    problem = fault(picture.path)
    return Problem(picture.name, problem) if problem else picture
