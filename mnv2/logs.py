"""The lines that a run prints, as the reference prints them."""

from __future__ import annotations

from .engine import Evaluation, TrainedEpoch, wilson_interval


def epoch_lines(epoch: int, epochs: int, result: TrainedEpoch, lr: float, epoch_seconds: float) -> str:
    """Two lines of an epoch of training; times are in milliseconds.

    ``time`` is that of the training steps, ``Epoch time`` (``epoch_seconds``) that of the whole epoch.
    """
    steps = result.steps
    return (
        f"Epoch:[{epoch}/{epochs}], step:[{steps}/{steps}], loss:[{result.last_loss:5.3f}/{result.mean_loss:5.3f}], "
        f"time:{result.seconds * 1000:5.3f}, lr:{lr:5.5f}\n"
        f"Epoch time:{epoch_seconds * 1000:5.3f}, per step time:{epoch_seconds * 1000 / steps:5.3f}, "
        f"avg loss:{result.mean_loss:5.3f}"
    )


def evaluation_lines(result: Evaluation, smooth_factor: float) -> str:
    """The lines of an evaluation; the last is a Python dictionary of the two accuracies."""
    lines = [
        f"{result.pictures} pictures, loss {result.loss:.4f} (label smoothing {smooth_factor:g}), "
        f"{result.pictures_per_second:.1f} pictures a second"
    ]
    for name, right in (("top-1", result.top1), ("top-5", result.top5)):
        low, high = wilson_interval(right, result.pictures)
        lines.append(
            f"{name}: {right} of {result.pictures} right, {right / result.pictures:.2%}, "
            f"95% interval {low:.2%} to {high:.2%}"
        )
    accuracies = {"Top_1_Accuracy": result.top1 / result.pictures, "Top_5_Accuracy": result.top5 / result.pictures}
    return "\n".join([*lines, str(accuracies)])
