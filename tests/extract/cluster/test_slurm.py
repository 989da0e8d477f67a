"""Submission with sbatch, and waiting with squeue, both replaced by bash scripts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gridcap.common.errors import GridcapError, UserError
from gridcap.extract.cluster import slurm
from gridcap.extract.cluster.job_script import slurm_folder
from gridcap.extract.cluster.slurm import follow
from gridcap.extract.manifest import ImageList
from gridcap.extract.plan import Plan


def test_submit_writes_the_script_and_returns_the_job_id(
    tmp_path: Path, fake_command: Callable[[str, str], None]
) -> None:
    fake_command("sbatch", f"cat \"${{@: -1}}\" >'{tmp_path}/seen'; echo '1234;cluster'")
    assert slurm.submit("#!/bin/sh\n", tmp_path / "s") == "1234"
    assert (tmp_path / "seen").read_text() == (slurm_folder(tmp_path / "s") / "job.sh").read_text() == "#!/bin/sh\n"


def test_a_missing_sbatch_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch"):
        slurm.submit("", tmp_path / "s")


def test_an_sbatch_error_is_shown(tmp_path: Path, fake_command: Callable[[str, str], None]) -> None:
    fake_command("sbatch", "echo 'sbatch: error: invalid partition specified: gpuu' >&2; exit 1")
    with pytest.raises(GridcapError, match="invalid partition specified: gpuu"):
        slurm.submit("", tmp_path / "s")


@pytest.fixture
def plan() -> Plan:
    """Return a plan of four shards."""
    images = [(i, f"{i}.png") for i in range(8)]
    return Plan("s", 2, 2, {}, (ImageList.from_images(images, 2),))


@pytest.fixture
def fast_polling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "POLL_INTERVAL", 0.01)
    monkeypatch.setattr(slurm, "POLLS_PER_QUERY", 1)


def squeue(*answers: str) -> str:
    """Return a fake squeue that gives the answers in turn and then repeats the last one."""
    cases = "\n".join(f"{i}) {answer};;" for i, answer in enumerate(answers[:-1]))
    return f"""
count=$(cat "$0.count" 2>/dev/null || echo 0)
echo $((count + 1)) >"$0.count"
case $count in
{cases}
*) {answers[-1]} ;;
esac"""


UNLISTED = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
SILENT = "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"
RUNNING = "echo '0|RUNNING|None|0|'; echo '1|PENDING|Resources|0|'"


def test_follow_returns_when_the_store_is_complete(
    tmp_path: Path, plan: Plan, fake_command: Callable[[str, str], None], fast_polling: None
) -> None:
    shards = " ".join(f"'{tmp_path}/s/{plan.shard_name(i)}'" for i in range(4))
    (tmp_path / "s").mkdir()
    (tmp_path / "s.h5").touch()  # an index of an earlier run: not sufficient for a complete store
    fake_command("squeue", squeue(RUNNING, SILENT, f"{RUNNING}; touch {shards}"))
    follow("7", tmp_path / "s.h5", tmp_path / "s", plan)


def test_item_14_follow_discards_stale_listings_before_it_reports_missing_shards(
    tmp_path: Path,
    plan: Plan,
    fake_command: Callable[[str, str], None],
    fast_polling: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The listing omits two shards until a file is created in the folder, and no task has written the index."""
    store = tmp_path / "s"
    store.mkdir()
    for number in range(4):
        (store / plan.shard_name(number)).touch()
    created = store.stat().st_mtime_ns
    list_shards = Plan.existing_shards

    def stale_listing(self: Plan, folder: Path) -> list[int]:
        return list_shards(self, folder)[: 2 if store.stat().st_mtime_ns == created else 4]

    monkeypatch.setattr(Plan, "existing_shards", stale_listing)
    fake_command("squeue", squeue("echo '0|COMPLETED|None|0|'"))
    follow("7", tmp_path / "s.h5", store, plan)
    assert len(list(store.iterdir())) == 4, "no temporary file remains"


@pytest.mark.parametrize(
    ("answers", "ends"),
    [
        (("echo '0|COMPLETED|None|0|'; echo '1|FAILED|NonZeroExitCode|1|'",), "task 0 COMPLETED; task 1 FAILED"),
        (
            (RUNNING, SILENT, "echo '0|CANCELLED|None|0|'; echo '1|TIMEOUT|None|0|'"),
            "task 0 CANCELLED; task 1 TIMEOUT",
        ),
        ((RUNNING, UNLISTED), "task 0 RUNNING when last seen; task 1 PENDING when last seen"),
        ((UNLISTED,), "Slurm no longer lists its tasks"),
    ],
)
def test_follow_reports_how_the_tasks_ended(
    tmp_path: Path,
    plan: Plan,
    fake_command: Callable[[str, str], None],
    fast_polling: None,
    answers: tuple[str, ...],
    ends: str,
) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / plan.shard_name(2)).touch()
    fake_command("squeue", squeue(*answers))
    with pytest.raises(GridcapError) as caught:
        follow("7", tmp_path / "s.h5", tmp_path / "s", plan)
    assert f"3 of 4 shards are missing: {ends}" in caught.value.message
    assert "s.slurm/7_*.log" in caught.value.hint
    assert caught.value.exit_status == 1
