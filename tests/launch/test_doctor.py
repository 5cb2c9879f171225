"""What the doctor says of a site, on a cluster whose answers a test gives."""

from __future__ import annotations

import json
import subprocess
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from rtshpc.core.config import SiteConfig
from rtshpc.launch.__main__ import main
from rtshpc.launch.doctor.cluster import examine_site
from rtshpc.launch.doctor.finding import Finding

CONFIG = """\
Configuration data as of {now}
AccountingStorageType   = accounting_storage/slurmdbd
AccountingStorageTRES   = cpu,mem,gres/gpu
ClusterName             = arctic
MaxArraySize            = 501
SLURM_VERSION           = 23.11.4
"""
PARTITIONS = """\
PartitionName=a100 AllowAccounts=geo,ice AllowQos=ALL Default=NO MaxTime=08:00:00 State=UP
PartitionName=debug AllowAccounts=ALL Default=YES MaxTime=UNLIMITED State=DOWN
"""
NODES = "n1|idle|64|256000|gpu:a100:4(S:0-1)|a100,nvlink\nn2|drained*|64|256000|gpu:a100:4(S:0-1)|a100\n"


@pytest.fixture
def cluster(programs: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cluster where all is well."""
    now = datetime.now().isoformat(timespec="seconds")
    folder: Path = programs.folder
    (folder / "config").write_text(CONFIG.format(now=now))
    (folder / "partitions").write_text(PARTITIONS)
    scontrol = folder / "scontrol"
    scontrol.write_text(
        f'#!/bin/sh\ncase "$*" in *config) cat "{folder}/config";; *) cat "{folder}/partitions";; esac\n'
    )
    scontrol.chmod(0o755)
    for name in ("squeue", "scancel", "srun", "sacct"):
        programs.says(name, "")
    programs.says("sinfo", NODES)
    programs.says("sacctmgr", "")
    programs.says("sbatch", "", 0, "sbatch: Job 12 to start at 2026-01-02T03:04:05 using 8 processors on nodes n1")
    return programs


def site(**given: Any) -> SiteConfig:
    facts: dict[str, Any] = {"executor": "slurm", "partition": "a100", "gpus": 1, "minutes": 60, "max_array": 500}
    return SiteConfig.model_validate(facts | given)


def found(folder: Path, **given: Any) -> dict[str, Finding]:
    return {one.name: one for one in examine_site(site(**given), folder)}


def test_a_site_that_its_cluster_takes_has_nothing_bad(cluster: Any, tmp_path: Path) -> None:
    findings = found(tmp_path)
    assert {one.state for one in findings.values()} <= {"ok", "off"}, findings
    assert findings["nodes"].found == "2 of 2 in a100 can hold a task, 1 of them are down or drained"
    assert findings["request of pretrain"].found.startswith("accepted: would start at 2026-01-02")
    assert findings["accounting"].found == "slurmdbd, GPUs are counted"
    asked = cluster.asked("sbatch")
    assert len(asked) == 2 and set(asked) == {"--test-only"}
    assert list(tmp_path.glob("*")) == [cluster.folder]


@pytest.mark.parametrize(
    ("given", "name", "words"),
    [
        ({"partition": "a10"}, "partition", 'site.partition = "a10" is unknown. Known: a100, debug. Did you mean "a100"?'),
        ({"partition": ""}, "partition", "debug is DOWN"),
        ({"account": "snow"}, "partition", "a100 is closed to account snow"),
        ({"minutes": 999}, "time limit", "site.minutes = 999, a100 allows 480"),
        ({"max_array": 1000}, "array size", "the cluster takes 500"),
        ({"cpus": 65}, "nodes", "cores 64 < site.cpus = 65"),
        ({"memory_gb": 300}, "nodes", "memory 256000 MB < site.memory_gb = 300"),
        ({"gpus": 5}, "nodes", "GPUs gpu:a100:4(S:0-1) < site.gpus = 5"),
        ({"gpu_type": "a5000"}, "nodes", "< site.gpus = 1"),
        ({"nodes": 3}, "nodes", "2 of 2 in a100 can hold a task, site.nodes = 3"),
        ({"nodes": 2, "gpus": 4, "cpus": 20}, "nodes", "cores 64 < site.cpus = 20 x 4 tasks"),
        ({"gpu_memory_gb": 90}, "GPU memory", "site.gpu_memory_gb = 90, a100 has 40 or 80 GB"),
        ({"constraint": "nvlink&ib"}, "nodes", "without nvlink&ib"),
        ({"binds": ["/no/such:/data"]}, "binds", "not there: /no/such"),
        ({"image": "/no/such.sif"}, "image", "no such image"),
        ({"modules": ["no-such"]}, "modules", "no-such: "),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("cluster")
def test_what_the_cluster_would_refuse_is_named(tmp_path: Path, given: dict[str, Any], name: str, words: str) -> None:
    finding = found(tmp_path, **given)[name]
    assert finding.state == "bad" and words in finding.found


def test_what_a_site_says_of_its_nodes_and_their_price_is_held_beside_what_slurm_says(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = {"node_gpus": 4, "node_cpus": 64, "node_memory_gb": 256, "gpu_memory_gb": 40}
    findings = found(tmp_path, **right, charge_per_node_hour=8, cpus=32)
    assert findings["node counts"].found == "as Slurm has them"
    assert findings["GPU memory"].state == "ok"
    assert (
        findings["charge"].found == "a training costs 4 an hour (0.5 nodes)"
    )  # half of the cores, a quarter of the GPUs
    wrong = found(tmp_path, node_gpus=8, node_memory_gb=512, charge_per_gpu_hour=1.5, gpus=4, nodes=2)
    told = "site.node_gpus = 8, Slurm says 4; site.node_memory_gb = 512, Slurm says 250"
    assert (wrong["node counts"].state, wrong["node counts"].found) == ("off", told)
    assert wrong["charge"].found == "a training costs 12 an hour (8 GPUs)"
    assert {"node counts", "GPU memory", "charge", "scratch"}.isdisjoint(found(tmp_path))


def test_a_scratch_folder_is_looked_for_and_accounting_that_is_off_is_not_asked(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODE_SCRATCH", str(tmp_path))
    finding = found(tmp_path, scratch="NODE_SCRATCH", stage_shards=True)["scratch"]
    assert finding.state == "ok" and finding.found.endswith("free here, shards are staged")
    monkeypatch.setenv("NODE_SCRATCH", str(tmp_path / "gone"))
    assert "cannot be written here" in found(tmp_path, scratch="NODE_SCRATCH")["scratch"].found
    monkeypatch.delenv("NODE_SCRATCH")
    assert found(tmp_path, scratch="NODE_SCRATCH")["scratch"].found == "site.scratch = NODE_SCRATCH is not set here"
    before = len(cluster.asked("sacct"))
    assert found(tmp_path, accounting=False)["accounting"].found == "site.accounting is off"
    assert len(cluster.asked("sacct")) == before > 0


def test_a_node_that_is_able_but_down_is_no_help(cluster: Any, tmp_path: Path) -> None:
    cluster.says("sinfo", NODES.splitlines()[1])
    assert found(tmp_path)["nodes"].state == "bad"


def test_accounts_and_limits_of_jobs_come_from_the_database(cluster: Any, tmp_path: Path) -> None:
    cluster.says("sacctmgr", "geo|\nice|\n")
    assert found(tmp_path, account="geo")["account"].state == "ok"
    finding = found(tmp_path, account="gea")["account"]
    assert (finding.state, 'Did you mean "geo"?' in finding.found) == ("bad", True)
    cluster.says("sacctmgr", "normal|200|\nlong|50|40\n")
    assert "takes 200 jobs" in found(tmp_path)["submit limit"].found
    assert found(tmp_path, qos="long")["submit limit"].advice.startswith("set site.submit_limit: 40")
    assert "submit limit" not in found(tmp_path, qos="long", submit_limit=40)
    assert "site.qos" in found(tmp_path, qos="short")["qos"].found


def test_what_sbatch_refuses_is_its_own_word(cluster: Any, tmp_path: Path) -> None:
    cluster.says("sbatch", "", 1, "sbatch: error: invalid account or account/partition combination")
    finding = found(tmp_path)["request of preprocess"]
    assert (finding.state, finding.found) == ("bad", "refused: invalid account or account/partition combination")


def test_a_controller_whose_clock_is_off_is_told(cluster: Any, tmp_path: Path) -> None:
    late = (datetime.now() - timedelta(minutes=2)).isoformat(timespec="seconds")
    (cluster.folder / "config").write_text(CONFIG.format(now=late))
    assert "s behind this node" in found(tmp_path)["cluster clock"].found


def test_a_file_server_whose_clock_is_off_is_told(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 60)
    assert "60 s ahead of this node" in found(tmp_path)["file clock"].found


def test_without_slurm_a_slurm_site_is_one_bad_finding_and_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["doctor", "--site", "slurm-a100", "--runs", str(tmp_path), "--json"]) == 1
    bad = [one for one in json.loads(capsys.readouterr().out) if one["state"] == "bad"]
    assert [one["name"] for one in bad] == ["slurm"] and "login node" in bad[0]["advice"]
    assert main(["doctor", "--site", "no-such-site"]) == 2


def test_a_local_site_is_not_asked_for_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *line, **_: pytest.fail(f"ran {line}"))
    assert [one.name for one in examine_site(SiteConfig(), tmp_path)] == ["image"]
