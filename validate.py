"""Evaluate MobileNetV2.

    python validate.py --alpha 0.75 --resize 192 --pretrained True --data_url ./dataset/imagenet

Under torchrun the pictures are shared out among the processes; the result is the same. `--help` lists the flags.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from mnv2.atomic import check_place
from mnv2.config import ValidateConfig, check_backend
from mnv2.distributed import World, world
from mnv2.engine import Evaluation
from mnv2.errors import InputError, RunError, exit_status
from mnv2.evaluation import evaluation
from mnv2.files import Pictures, check_pictures, list_pictures
from mnv2.flags import parse
from mnv2.precision import numerics
from mnv2.pretrained import find
from mnv2.sweep import Row, table, variants


def validate(config: ValidateConfig, world: World) -> Evaluation:
    """Evaluate as ``config`` says, and print what came out."""
    if config.results and world.rank == 0:
        check_place("--results", config.results)
    pictures = None if config.synthetic else list_pictures(config.data_url, "val", config.val_labels)
    trained = find(config, world)
    if config.results and trained is not None:
        trained.check_apart("--results", config.results)
    return evaluation(config, world, pictures, trained)


def sweep(config: ValidateConfig, world: World) -> None:
    """Evaluate each variant that ``--sweep`` names on the same pictures, and print a table of them.

    A variant without weights has a line that says so.

    Raises:
        InputError: one that is named has no weights, or where none is named, none has.
    """
    runs = [replace(config, alpha=alpha, resize=resize) for alpha, resize in variants(config.sweep or ())]
    pictures = None
    if not config.synthetic:
        pictures = list_pictures(config.data_url, "val", config.val_labels)
        pictures = check_pictures(pictures, config.bad_files, world)
    rows = []
    try:
        for run in runs:
            rows.append(sweep_one(run, world, pictures))
    finally:
        world.print(f"\n{table(rows)}")
    missing = [row.name for row in rows if row.result is None]
    if config.sweep and missing:
        raise InputError(f"--sweep: expected weights that fit of every variant named, got none of {', '.join(missing)}")
    if len(missing) == len(rows):
        raise InputError("--sweep: expected weights that fit of one variant at least, got none")


def sweep_one(config: ValidateConfig, world: World, pictures: Pictures | None) -> Row:
    """Evaluate the variant of ``config`` where there are weights of it."""
    assert config.alpha is not None
    row = Row(config.alpha, config.resize)
    world.print(f"\n{row.name}")
    try:
        weights = find(config, world)
    except InputError as error:
        world.print(error)
        return row
    try:
        return replace(row, weights=weights, result=evaluation(config, world, pictures, weights))
    except InputError as error:  # for all processes, as they have the same pictures and weights
        world.print(error)
        return row


def check_accuracy(config: ValidateConfig, result: Evaluation) -> None:
    """Raise RunError where top-1 isn't what ``config`` expects."""
    if config.expect is None:
        return
    # In decimal as typed: 0.7197 lies within 0.001 of 0.7187, which binary fractions don't.
    expect, tolerance = Fraction(str(config.expect)), Fraction(str(config.tolerance))
    if abs(Fraction(result.top1, result.pictures) - expect) > tolerance:
        raise RunError(
            f"--expect: top-1 is {result.top1 / result.pictures:.6g} ({result.top1} of {result.pictures}), expected "
            f"{config.expect:g} to within {config.tolerance:g}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    config = parse(ValidateConfig, argv, "Evaluate MobileNetV2.")

    def action() -> None:
        with numerics(config.deterministic), world(config.device, config.run_distribute) as here:
            check_backend(config.backend, here.device)
            if config.sweep is not None:
                return sweep(config, here)
            result = validate(config, here)
        if here.rank == 0:  # all have parted, so that no other tells it again
            check_accuracy(config, result)

    return exit_status("validate.py", action)


if __name__ == "__main__":
    sys.exit(main())
