from __future__ import annotations

import re

import pytest

from mnv2.errors import InputError
from mnv2.launch import Place, find, first_node

MASTER = {"MASTER_ADDR": "node7", "MASTER_PORT": "1234"}
TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", **MASTER}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_ID": "77",
}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place("python", 0, 0, 1, None)),
        (TORCHRUN, Place("torchrun", 3, 1, 4, "tcp://node7:1234")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Place("torchrun", 0, 0, 1, None)),
        (OPEN_MPI, Place("Open MPI", 1, 1, 2, "tcp://127.0.0.1:29500")),
        ({**OPEN_MPI, **MASTER}, Place("Open MPI", 1, 1, 2, "tcp://node7:1234")),
        (MPICH, Place("MPICH", 1, 1, 2, "tcp://127.0.0.1:29500")),
        ({**MPICH, "MASTER_PORT": "99"}, Place("MPICH", 1, 1, 2, "tcp://127.0.0.1:99")),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Place("MPICH", 1, 1, 2, "tcp://127.0.0.1:29500")),
        ({**MPICH, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, Place("MPICH", 1, 1, 2, "tcp://127.0.0.1:29500")),
        ({"PMI_RANK": "9", "PMI_SIZE": "9", **SLURM, **MASTER}, Place("Slurm", 5, 1, 8, "tcp://node7:1234")),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, Place("Slurm", 1, 1, 2, "tcp://127.0.0.1:29500")),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Place("Slurm", 0, 1, 1, None)),
        ({**SLURM, **OPEN_MPI, **TORCHRUN}, Place("torchrun", 3, 1, 4, "tcp://node7:1234")),
        ({**SLURM, **OPEN_MPI, **MASTER}, Place("Open MPI", 1, 1, 2, "tcp://node7:1234")),
        ({**TORCHRUN, "MASTER_ADDR": "fe80::1"}, Place("torchrun", 3, 1, 4, "tcp://[fe80::1]:1234")),
    ],
    ids=lambda value: value.launcher if isinstance(value, Place) else "+".join(value)[:30] or "none",
)
def test_a_process_finds_its_place(environment, place):
    assert find(environment) == place


def test_slurm_meets_on_its_first_node_at_a_port_of_the_job():
    place = find(SLURM)
    assert place[:4] == ("Slurm", 5, 1, 8)
    assert re.fullmatch(r"tcp://gpu03:[12]\d{4}", place.meeting)
    assert find({**SLURM, "SLURM_PROCID": "0"}).meeting == place.meeting
    for other in ({"SLURM_JOB_ID": "78"}, {"SLURM_STEP_ID": "1"}):
        assert find({**SLURM, **other}).meeting != place.meeting


def test_two_jobs_of_open_mpi_meet_at_two_ports():
    meetings = {find({**OPEN_MPI, "PMIX_NAMESPACE": f"prterun-host-{job}@1"}).meeting for job in range(20)}
    assert len(meetings) == 20


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a1,b2", "a1"), ("n[03-07,12]", "n03"), ("n[3,5]", "n3"), ("r1-n[1-2]-ib,x", "r1-n1-ib")],
)
def test_the_first_node_of_a_list(nodes, first):
    assert first_node(nodes) == first


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "MASTER_ADDR: expected the first machine's address"),
        ({**MPICH, "MPI_LOCALNRANKS": "1"}, "MASTER_ADDR: expected the first machine's address"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "x"}, "OMPI_COMM_WORLD_SIZE: expected an integer .* got 'x'"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "2"}, "OMPI_COMM_WORLD_RANK: expected 0 to 1 for a OMPI_COMM_WORLD_SIZE"),
        ({"RANK": "one"}, "RANK: expected an integer in the environment, got 'one'"),
        ({"WORLD_SIZE": "one"}, "WORLD_SIZE: expected an integer in the environment, got 'one'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: expected a positive integer in the environment, got 0"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE: 2 processes are announced, but RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE: 2 processes are announced, but MASTER_ADDR is not set"),
        ({**TORCHRUN, "RANK": "4"}, "RANK: expected 0 to 3 for a WORLD_SIZE of 4, got 4"),
        ({**TORCHRUN, "MASTER_PORT": "abc"}, "MASTER_PORT: expected an integer in the environment, got 'abc'"),
        ({**TORCHRUN, "LOCAL_RANK": "one"}, "LOCAL_RANK: expected an integer in the environment, got 'one'"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "MASTER_PORT is not set; start them with torchrun"),
        ({**SLURM, "SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST: expected names of nodes"),
    ],
)
def test_variables_that_can_not_be_used(environment, message):
    with pytest.raises(InputError, match=message):
        find(environment)
