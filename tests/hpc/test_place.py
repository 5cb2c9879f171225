from __future__ import annotations

from rtshpc.hpc.site import Place, meeting, place_in_step

STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
MEETING = {"MASTER_ADDR": "n1", "MASTER_PORT": "20007"}


def test_tasks_of_a_step_train_together_only_where_the_batch_script_says_where_they_meet() -> None:
    assert place_in_step(STEP | MEETING) == Place(3, 4, 1, "tcp://n1:20007")
    assert place_in_step(STEP) is None
    assert place_in_step(MEETING | {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None
    assert place_in_step(STEP | MEETING | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert place_in_step({}) is None


def test_the_tasks_of_a_step_meet_on_the_first_node_at_a_port_of_their_job_and_single_tasks_nowhere() -> None:
    assert meeting("n1", STEP | {"SLURM_JOB_ID": "60007"}) == MEETING
    assert meeting("n1", {"SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_ID": "60007"}) == meeting("", {}) == {}
