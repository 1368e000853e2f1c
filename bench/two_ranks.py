"""Training by two processes on two GPUs through NCCL, and an evaluation that gives one process's digits.

    python -m bench.two_ranks FOLDER [--device cuda]

Two ranks train for an epoch on the embedded digits, through the kernels in fp16 with statistics over both; then one
process and two evaluate the checkpoint. All that an evaluation prints of accuracy and loss must be the same.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mnv2.errors import RunError, exit_status

ROOT = Path(__file__).resolve().parent.parent
NETWORK = ("--alpha", "0.35", "--resize", "32", "--preprocessing", "torchvision")
SPEED = re.compile(r", [0-9.]+ pictures a second")


def script(name: str, ranks: int, *words: str) -> list[str]:
    """Command of a script in one process or several."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, str(ROOT / name), *NETWORK, *words]


def run(command: Sequence[str]) -> str:
    """What ``command`` prints, which is printed here too.

    Raises:
        RunError: it fails.
    """
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    print(ran.stdout, end="", flush=True)
    if ran.returncode:
        raise RunError(f"{' '.join(command[1:])} returned {ran.returncode}")
    return ran.stdout


def digits_of(printed: str) -> list[str]:
    """The four lines of an evaluation without its speed."""
    return [SPEED.sub("", line) for line in printed.splitlines()[-4:]]


def check(folder: Path, device: str) -> None:
    """Train and evaluate.

    Raises:
        RunError: a command fails, or evaluations differ.
    """
    data, place = ["--data_url", str(folder / "digits")], ["--device", device]
    run([sys.executable, "-m", "mnv2.digits", str(folder / "digits")])
    training = ["--epoch_size", "1", "--max_lr", "0.05", "--precision", "fp16", "--sync_bn", "true"]
    run(script("train.py", 2, *data, *place, *training, "--ckpt_save_dir", str(folder / "checkpoints")))
    weights = ["--pretrained", str(folder / "checkpoints" / "last.pt")]
    one, two = (digits_of(run(script("validate.py", ranks, *data, *place, *weights))) for ranks in (1, 2))
    if one != two:
        raise RunError(f"one process and two disagree: {one} and {two}")
    print("two processes trained, and evaluate as one does")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.two_ranks", description="Train and evaluate by two ranks.")
    parser.add_argument("folder", metavar="FOLDER", help="where data and checkpoints are written")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="where the ranks run")
    words = parser.parse_args(argv)
    return exit_status("bench.two_ranks", lambda: check(Path(words.folder), words.device))


if __name__ == "__main__":
    sys.exit(main())
