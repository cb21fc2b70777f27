"""What srun and mpirun say is understood as torchrun's variables, or refused: no process may think itself alone."""

import pytest

from longreach.trainer.ranks import launchers

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
STEP = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "71"}


def adopted(**environment: str) -> dict[str, str]:
    launchers.adopt(environment)
    return environment


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (STEP | {"SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "gpu7"}, ("3", "4", "1", "127.0.0.1")),
        (STEP | {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "gpu[07-08]"}, ("3", "4", "1", "gpu07")),
        (STEP | {"SLURM_NNODES": "2", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"}, ("3", "4", "1", "10.0.0.7")),
        (STEP | {"MASTER_ADDR": "head", "WORLD_SIZE": "4"}, ("3", "4", "1", "head")),  # as many job scripts export
        (STEP | {"PMI_SIZE": "4", "PMI_RANK": "3"}, ("3", "4", "1", "127.0.0.1")),  # srun --mpi=pmi2
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, ("3", "4", "1", "127.0.0.1")),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "head"}, ("3", "4", "1", "head")),
        # mpirun in a job of Slurm, whose variables count mpirun's daemons
        (OPEN_MPI | STEP | {"SLURM_PROCID": "1", "SLURM_JOB_NODELIST": "a[1-2]"}, ("3", "4", "1", "a1")),
        (
            {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
            ("1", "2", "1", "127.0.0.1"),
        ),
    ],
)
def test_the_tasks_of_srun_and_mpirun_form_one_world(environment: dict[str, str], expected: tuple[str, ...]) -> None:
    got = adopted(**environment)
    assert tuple(got[name] for name in NAMES) == expected
    assert 1024 < int(got["MASTER_PORT"]) < 32768


def test_jobs_on_one_machine_meet_at_different_ports() -> None:
    ports = {adopted(**STEP | {"SLURM_STEP_ID": str(step)})["MASTER_PORT"] for step in range(20)}
    assert len(ports) >= 19
    same = {adopted(**STEP | {"SLURM_PROCID": str(rank)})["MASTER_PORT"] for rank in range(4)}
    assert len(same) == 1
    assert adopted(**STEP | {"MASTER_PORT": "4242"})["MASTER_PORT"] == "4242"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"},
        {
            "SLURM_NTASKS": "8",
            "SLURM_STEP_NUM_TASKS": "1",
            "SLURM_PROCID": "0",
            "SLURM_STEP_ID": "4294967290",
        },  # salloc
        {"OMPI_COMM_WORLD_SIZE": "1"},
        STEP | {"RANK": "0", "WORLD_SIZE": "16", "MASTER_ADDR": "x", "MASTER_PORT": "1"},  # torchrun in a task of srun
    ],
)
def test_one_process_and_torchruns_are_left_alone(environment: dict[str, str]) -> None:
    assert adopted(**environment) == environment


def test_a_process_alone_in_a_shell_of_salloc_is_told() -> None:
    assert "trains alone" in (launchers.adopt({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}) or "")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "Slurm's 2 tasks must be started by srun.* or torchrun"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "Slurm's 2 tasks must be started by srun"),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}, "SLURM_LOCALID is not set"),
        ({"SLURM_NTASKS": "two", "SLURM_STEP_ID": "0"}, "SLURM_NTASKS must be a number; got 'two'"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI must set .*OMPI_COMM_WORLD_RANK.* torchrun"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "MASTER_ADDR must be the address"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "MPICH must set .* MPI_LOCALRANKID is not set although PMI_SIZE is 2"),
        ({"RANK": "1"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not set although RANK is 1"),
    ],
)
def test_what_cannot_form_a_world_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launchers.adopt(environment)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("gpu7", "gpu7"), ("n[003-010,12],x1", "n003"), ("r[0-1]n[2,4]e,x", "r0n2e"), ("a,b", "a"), ("", "")],
)
def test_the_first_node_of_slurms_list(hosts: str, first: str) -> None:
    assert launchers.first_host(hosts) == first


def test_commands_of_one_process_know_which_of_several_they_are() -> None:
    assert launchers.rank({}) == 0
    assert launchers.rank(OPEN_MPI) == 3
    assert launchers.rank(STEP) == 3
    assert launchers.rank(STEP | {"RANK": "0"}) == 0
    assert launchers.rank({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}) == 0  # a batch script


def test_a_task_that_sees_its_own_gpu_alone_takes_it() -> None:
    environment = dict(STEP)
    launchers.adopt(environment)
    assert not launchers.one_gpu_a_process(environment)
    assert launchers.one_gpu_a_process(environment | {"SLURM_GPUS_PER_TASK": "1"})
