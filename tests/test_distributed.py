"""Several processes: what they agree on, how they end together, and every launcher."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
from processes import ROOT, finish, fork, free_port, popen, run, start

from mnv2.distributed import StopSignals, World


def written(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text)
    return path


AGREE = """
import torch
from mnv2.distributed import World, world
with world("cpu") as here:
    tensors = [torch.full((3,), float(here.rank)), torch.arange(2.0).reshape(2, 1) * (here.rank + 1)]
    here.average_(tensors)
    assert torch.equal(tensors[0], torch.ones(3)), tensors
    assert torch.equal(tensors[1], torch.tensor([[0.0], [2.0]])), tensors
    assert here.share({"rank": here.rank, "tensor": torch.ones(2)})["rank"] == 0
    assert here.gather(here.rank) == [0, 1, 2]
    assert int(here.sum(torch.tensor(here.rank))) == 3
    here.wait()
    here.print("agreed")
"""


def test_what_processes_agree_on(tmp_path):
    done = finish(start(written(tmp_path, AGREE), processes=3))
    assert [one.returncode for one in done] == [0, 0, 0], "".join(one.stderr for one in done)
    assert [one.stdout for one in done] == ["agreed\n", "", ""]


FAIL = """
import os, sys, time
import torch
from mnv2.errors import InputError, exit_status
from mnv2.distributed import world
def action():
    with world("cpu") as here:
        here.wait()
        if here.rank == {rank}:
            {failure}
        here.sum(torch.ones(1))
        time.sleep(100)
sys.exit(exit_status("script.py", action))
"""
CAUSES = {
    "an-input-error": ("raise InputError('the cause')", "the cause"),
    "a-bug": ("[][1]", "IndexError: list index out of range"),
    "a-kill": ("os.kill(os.getpid(), 9)", "lost contact with another process"),
}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("failure", "cause"), CAUSES.values(), ids=CAUSES.keys())
def test_a_failure_of_one_process_ends_all(tmp_path, failure, cause, rank):
    """Others wait in a reduction or sleep; with what they say in different files, one alone tells the cause."""
    script = written(tmp_path, FAIL.format(rank=rank, failure=failure))
    done = finish(start(script, processes=3))
    assert all(one.returncode != 0 for one in done)
    told = [line for one in done for line in one.stderr.splitlines() if cause in line]
    if "kill" in failure:
        assert told
        assert all(line.startswith("script.py: rank ") for line in told)
    else:
        before = f"[rank{rank}]: " if "IndexError" in cause else f"script.py: rank {rank}: " if rank else "script.py: "
        assert told == [before + cause]
        others = [one for place, one in enumerate(done) if place != rank]
        assert [one.returncode for one in others] == [1, 1]
        assert "Traceback" not in "".join(one.stderr for one in others)


def test_a_failure_of_all_is_told_once(tmp_path):
    script = written(tmp_path, FAIL.format(rank="here.rank", failure="raise InputError('the cause')"))
    done = finish(start(script, processes=3))
    assert [one.returncode for one in done] == [1, 1, 1]
    assert "".join(one.stderr for one in done).count("the cause") == 1


def test_processes_that_never_come_are_waited_for_in_vain(tmp_path):
    text = "import mnv2.distributed as d\nfrom datetime import timedelta\nd._MEETING = timedelta(seconds=2)\n"
    script = written(tmp_path, text + FAIL.format(rank=0, failure="pass"))
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    (done,) = finish([fork(script, RANK="0", WORLD_SIZE="2", **meeting)])
    assert done.returncode == 1
    expected = (
        r"script.py: torchrun announced 2 processes, but they didn't meet at tcp://127.0.0.1:\d+ \(.*\); MASTER_ADDR"
    )
    assert re.match(expected, done.stderr.splitlines()[-1])


def test_a_stop_signal_is_seen_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignals(World()) as stop:
        assert stop.poll() == 0
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # as torchrun's second
        assert stop.poll() == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_person_who_asks_again_is_obeyed_at_once(monkeypatch):
    monkeypatch.setattr("mnv2.distributed._IMPATIENCE", -1.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts ignoring it
    try:
        with StopSignals(World()):
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


TRAIN = [
    *("--alpha", "0.35", "--resize", "32", "--batch_size", "4", "--epoch_size", "1"),
    *("--eval_every", "0", "--num_parallel_workers", "1"),
]


def losses(output: str) -> list[str]:
    return re.findall(r"loss:\[\S+\]|avg loss:\S+", output)


@pytest.fixture(scope="module")
def expected(photos, tmp_path_factory):
    """Losses that plain Python prints, and the first of two processes with torchrun's variables."""
    folder = tmp_path_factory.mktemp("expected")
    words = [*TRAIN, "--data_url", photos, "--ckpt_save_dir"]
    done = [run("train.py", *words, folder / "one"), finish(start("train.py", *words, folder / "two", processes=2))[0]]
    found = [losses(one.stdout) for one in done]
    assert all(found), done[0].stderr + done[1].stderr
    assert found[0] != found[1]
    return {1: found[0], 2: found[1]}


def test_torchrun_trains_as_plain_python_does(photos, tmp_path, expected):
    done = run("train.py", *TRAIN, "--data_url", photos, "--ckpt_save_dir", tmp_path, processes=1)
    assert losses(done.stdout) == expected[1], done.stderr


def test_two_agents_on_the_loopback_address(photos, tmp_path, expected):
    port = str(free_port())
    agents = []
    for node in range(2):
        place = ["--nnodes", "2", "--node_rank", str(node), "--nproc_per_node", "1"]
        place += ["--master_addr", "127.0.0.1", "--master_port", port]
        command = [sys.executable, "-m", "torch.distributed.run", *place, str(ROOT / "train.py"), *TRAIN]
        command += ["--data_url", str(photos), "--ckpt_save_dir", str(tmp_path)]
        agents.append(popen(command))
    first, second = finish(agents)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert losses(first.stdout) == expected[2]
    assert second.stdout == ""


VARIABLES = {
    "open-mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpich": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}


@pytest.mark.parametrize("names", VARIABLES.values(), ids=VARIABLES.keys())
def test_a_launchers_variables_alone(photos, tmp_path, expected, names):
    rank, size, local_rank = names
    words = [*TRAIN, "--data_url", photos, "--ckpt_save_dir", tmp_path]
    place = {"MASTER_PORT": str(free_port()), size: "2"}
    started = [fork("train.py", *words, **place, **{rank: str(i), local_rank: str(i)}) for i in range(2)]
    first, second = finish(started)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert losses(first.stdout) == expected[2]
    assert second.stdout == ""


@pytest.mark.parametrize("processes", [1, 2])
def test_mpirun(photos, tmp_path, expected, processes):
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if mpirun is None:
        pytest.skip("no mpirun is installed")
    command = [mpirun, "-n", str(processes), sys.executable, str(ROOT / "train.py"), *TRAIN]
    command += ["--data_url", str(photos), "--ckpt_save_dir", str(tmp_path)]
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    (done,) = finish([popen(command, **as_root)])
    assert done.returncode == 0, done.stderr
    assert losses(done.stdout) == expected[processes]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_must_be_one_process(photos, tmp_path, expected, processes):
    words = [*TRAIN, "--data_url", photos, "--ckpt_save_dir", tmp_path, "--run_distribute", "False"]
    rank, size, _ = VARIABLES["open-mpi"]
    (done,) = finish([fork("train.py", *words, **{rank: "0", size: str(processes)})])
    if processes == 1:
        assert losses(done.stdout) == expected[1], done.stderr
    else:
        assert done.returncode == 1
        assert "--run_distribute: expected True, since Open MPI started 2 processes, got False" in done.stderr
