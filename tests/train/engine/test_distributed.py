"""Training with several ranks equals training with one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import gridcap.train.engine.loop
from gridcap.common.errors import MismatchError, TrainingError, UserError
from gridcap.train.engine.checkpoint import find_checkpoint, load_checkpoint
from gridcap.train.engine.distributed import SINGLE_PROCESS, Ranks, find_ranks, process_group
from gridcap.train.engine.job import Runtime
from gridcap.train.engine.loop import fit

NOT_COMPARED = ("seconds", "data_wait", "warnings")
TIMEOUT = 400  # seconds


# --- rank detection ---


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, SINGLE_PROCESS),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, SINGLE_PROCESS),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Ranks(5, 8, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Ranks(1, 2, 0)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}, Ranks(3, 4, 1)),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"},
            SINGLE_PROCESS,
        ),  # a batch script outside srun
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}, SINGLE_PROCESS),
        (
            {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
            Ranks(2, 4, 0),  # torchrun inside srun
        ),
    ],
)
def test_rank_is_read_from_torchrun_or_slurm_variables(environment, expected):
    assert find_ranks(environment) == expected


@pytest.mark.parametrize(
    "environment", [{"RANK": "2", "WORLD_SIZE": "2"}, {"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "4"}]
)
def test_inconsistent_rank_variables_are_rejected_by_name(environment):
    with pytest.raises(UserError, match=f"{next(iter(environment))}="):
        find_ranks(environment)


def test_only_rank_0_is_main():
    assert [Ranks(rank, 3, 0).is_main for rank in range(3)] == [True, False, False]


def test_collectives_of_a_single_process_are_identities():
    value = torch.tensor([1.0, 2.0])
    SINGLE_PROCESS.all_reduce([value])
    assert value.tolist() == [1, 2]
    assert SINGLE_PROCESS.all_gather("x") == ["x"]


@pytest.mark.parametrize(
    ("environment", "batch_size", "accumulate"),
    [
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, 3, 1),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 5, 3),
        ({}, 2, 3),
    ],
)
def test_batch_size_smaller_than_ranks_times_accumulation_steps_is_rejected(
    tmp_path, new_config, train_data, monkeypatch, environment, batch_size, accumulate
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("gridcap.train.engine.loop.find_ranks", lambda: find_ranks(environment))
    with pytest.raises(UserError, match=f"--batch-size {batch_size} .*{accumulate} gradient accumulation") as caught:
        fit(new_config(tmp_path / "run", batch_size=batch_size, grad_accum_steps=accumulate), train_data, None, False)
    assert "larger --batch-size" in caught.value.hint
    assert not (tmp_path / "run").exists()


# --- errors ---


def test_item_13_ranks_that_cannot_connect_are_not_a_usage_error(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("connection refused")

    monkeypatch.setattr("torch.distributed.init_process_group", fail)
    with (
        pytest.raises(TrainingError, match="rank 1 of 2 cannot connect") as caught,
        process_group(Ranks(1, 2, 1), torch.device("cpu")),
    ):
        pass
    assert caught.value.exit_status == 1


class Gathering(Ranks):
    """Rank 0 of two, which gathers None from rank 1."""

    def all_gather(self, value):
        return [value, None]


def test_all_ranks_raise_the_error_that_keeps_rank_0_from_creating_the_output_folder(tmp_path, monkeypatch):
    """Otherwise, the other ranks wait for rank 0 until a timeout."""
    (tmp_path / "file").touch()
    gathered = []
    monkeypatch.setattr(Gathering, "all_gather", lambda _, value: gathered.append(value) or [value, None])
    runtime = Runtime(torch.device("cpu"), ranks=Gathering(0, 2))
    job = SimpleNamespace(output=tmp_path / "file" / "run", runtime=runtime)
    with pytest.raises(NotADirectoryError), gridcap.train.engine.loop._exclusive_output(job):
        pass
    assert isinstance(gathered[0], NotADirectoryError)


def test_item_13_ranks_with_different_inputs_are_not_a_usage_error():
    job = SimpleNamespace(fingerprint={"data": "abc"}, runtime=Runtime(torch.device("cpu"), ranks=Gathering(0, 2)))
    run = SimpleNamespace(step=0, vocabulary=SimpleNamespace(tokens=["a"]))
    with pytest.raises(MismatchError, match="different checkpoints, vocabularies, or captions") as caught:
        gridcap.train.engine.loop._check_same_on_all_ranks(job, run)
    assert caught.value.exit_status == 1


# --- two ranks ---

# 13 images in steps of 6: the last step of an epoch has 1 image for 2 ranks with 2 accumulation steps each.
# 9 validation images in batches of 6: the ranks have unequal shares.
WORKER = """
import hashlib, json, os, sys
from pathlib import Path
import torch
import gridcap.train.engine.loop
from gridcap.common.captions.read import read_captions
from gridcap.common.config import PipelineConfig
from gridcap.common.store.reader import FeatureStore
from gridcap.train.data.captioned import CaptionedImages

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
torch.set_num_threads(1)

def load(name):
    captions = folder / f"{name}.json"
    return CaptionedImages.join(FeatureStore(folder / f"{name}.h5"), read_captions(captions).records, captions)

def digest(decoder):
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in decoder.parameters())).hexdigest()

real = gridcap.train.engine.loop.Trainer._finish_epoch
weights = []

def end_epoch(self, row):
    real(self, row)
    weights.append(digest(self.run.decoder))

def fail(self, run, *rest):
    if run.step == 2 and rank == "1":
        raise RuntimeError("a process fails")
    return real_step(self, run, *rest)

gridcap.train.engine.loop.Trainer._finish_epoch = end_epoch
if sys.argv[2:] == ["fail"]:
    real_step, gridcap.train.engine.loop.train_step = gridcap.train.engine.loop.train_step, fail
    config = PipelineConfig.model_validate_json((folder / "fail.config").read_text())
    gridcap.train.engine.loop.fit(config, load("train"), None, False)
    sys.exit(0)
for name, port in zip(sys.argv[2::2], sys.argv[3::2]):
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            sys.exit(status)
        continue
    os.environ.update(MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="False")  # one port per run
    config = PipelineConfig.model_validate_json((folder / f"{name}.config").read_text())
    if rank != "0" and not name.startswith("resume"):  # other ranks write nothing, so this folder must not appear
        changes = {"output": config.train.output.with_name(f"{name}-of-another-process")}
        config = config.model_copy(update={"train": config.train.model_copy(update=changes)})
    resume = name.startswith("resume")
    history = gridcap.train.engine.loop.fit(config, load("train"), load("val"), resume, progress=True)
    (folder / f"{name}.{rank}.json").write_text(json.dumps({"history": history, "weights": weights}))
    sys.stdout.flush()
    os._exit(0)
"""
SCST = {"objective": "scst", "scst": {"samples": 2}, "learning_rate": 0.003}
ACCUMULATION = {
    "one accumulation step": {"grad_accum_steps": 1},
    "two accumulation steps": {"grad_accum_steps": 2, "ema_decay": 0.9},
}
DROPOUT = {"scheduled_sampling": {"max_prob": 0.5, "prob_step": 0.5, "step_epochs": 1}}


def timeless(history):
    return [{k: v for k, v in row.items() if k not in NOT_COMPARED} for row in history]


def assert_close(ours, theirs):
    """Assert that two runs have equal histories and weights up to the order of summation."""
    rows, expected = (timeless(map(json.loads, (p / "metrics.jsonl").read_text().splitlines())) for p in (ours, theirs))
    assert len(rows) == len(expected) > 0
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=2e-4)
    assert find_checkpoint(ours, "best").name == find_checkpoint(theirs, "best").name
    for which in ("best", "last"):
        a, b = (load_checkpoint(run, which).decoder.state_dict() for run in (ours, theirs))
        torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-3)


class Pair:
    """A folder with data, single-process runs, and two-rank runs."""

    def __init__(self, folder, new_data, new_config, tiny_decoders):
        self.folder, self._new_config = folder, new_config
        self.decoder = tiny_decoders["attention"].model_copy(update={"dropout": 0.0})
        self.data = new_data(folder / "train.h5", 13), new_data(folder / "val.h5", 9, first_id=500, seed=1, split="val")
        fit(self.config("one", epochs=3), *self.data, False, progress=False)
        fit(self.config("one averaged", epochs=3, ema_decay=0.9), *self.data, False, progress=False)

    def config(self, name, **train):
        values = {"decoder": self.decoder, "batch_size": 6, "epochs": 3, "captions_per_image": 3}
        return self._new_config(self.folder / name, **values | train)

    def write(self, name, config):
        (self.folder / f"{name}.config").write_text(config.model_dump_json())

    def result(self, name, rank):
        return json.loads((self.folder / f"{name}.{rank}.json").read_text())


@pytest.fixture(scope="module")
def pair(tmp_path_factory, new_data, new_config, tiny_decoders):
    return Pair(tmp_path_factory.mktemp("pair"), new_data, new_config, tiny_decoders)


def torchrun(*command, cwd):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
        cwd=cwd,
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd()), "CUDA_VISIBLE_DEVICES": ""},
    )


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def two(pair):
    """Execute all two-rank runs with one torchrun call, and return its result."""
    for name, values in ACCUMULATION.items():
        pair.write(name, pair.config(name, **values))
    pair.write("scst", pair.config("scst", init_from=pair.folder / "one", **SCST))
    pair.write("dropout", pair.config("dropout", decoder=pair.decoder.model_copy(update={"dropout": 0.3}), **DROPOUT))
    config = pair.config("resume", checkpoint_steps=2)
    with pytest.MonkeyPatch.context() as patch:  # stop in the middle of the second epoch
        real = gridcap.train.engine.loop.train_step

        def stop(self, run, *args):
            if run.step == 5:
                raise KeyboardInterrupt
            return real(self, run, *args)

        patch.setattr("gridcap.train.engine.loop.train_step", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(config, *pair.data, False, progress=False)
    assert find_checkpoint(config.train.output, "last").name == "step-00000004"
    pair.write("resume", config)
    names = [*ACCUMULATION, "scst", "dropout", "resume"]
    (pair.folder / "worker.py").write_text(WORKER)
    ports = free_ports(len(names))
    arguments = [value for named in zip(names, ports, strict=True) for value in named]
    done = torchrun(pair.folder / "worker.py", pair.folder, *arguments, cwd=pair.folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.mark.slow
@pytest.mark.parametrize("name", ACCUMULATION)
@pytest.mark.usefixtures("two")
def test_two_ranks_train_the_same_weights_as_one(pair, name):
    assert_close(pair.folder / name, pair.folder / ("one averaged" if name == "two accumulation steps" else "one"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ACCUMULATION, "scst", "dropout", "resume"])
@pytest.mark.usefixtures("two")
def test_ranks_have_identical_weights_and_history_after_each_epoch(pair, name):
    first, second = (pair.result(name, rank) for rank in (0, 1))
    assert first["weights"] == second["weights"] != []
    assert len(set(first["weights"])) == len(first["weights"]), "each epoch changes the weights"
    assert timeless(first["history"]) == timeless(second["history"])


@pytest.mark.slow
@pytest.mark.usefixtures("two")
def test_two_ranks_resume_a_single_process_run(pair):
    assert_close(pair.folder / "resume", pair.folder / "one")


@pytest.mark.slow
@pytest.mark.usefixtures("two")
def test_validation_with_two_ranks_equals_single_process(pair):
    """SCST first validates the decoder it starts from."""
    best = load_checkpoint(pair.folder / "one")
    history = pair.result("scst", 1)["history"]
    row = next(
        r
        for r in map(json.loads, (pair.folder / "one" / "metrics.jsonl").read_text().splitlines())
        if f"step-{r['step']:08}" == best.path.name
    )
    for name in ("val_cider", "val_duplicate_share"):
        assert history[0][name] == row[name]
    for name in ("val_loss", "val_perplexity", "val_attention_entropy"):
        assert history[0][name] == pytest.approx(row[name], rel=1e-6)


@pytest.mark.slow
def test_only_rank_0_writes_and_prints(pair, two):
    assert not list(pair.folder.glob("*-of-another-process"))
    lines = [line for line in two.stdout.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 3 * len(ACCUMULATION) + 4 + 3 + 2, (
        two.stdout
    )  # SCST has an epoch 0; the resumed run has 2 epochs left
    steps = [
        json.loads(line)["step"]
        for line in (pair.folder / "one accumulation step" / "steps.jsonl").read_text().splitlines()
    ]
    assert steps == [1, 4, 7]


@pytest.mark.slow
def test_error_in_one_rank_ends_the_command(pair, two):
    pair.write("fail", pair.config("fail", checkpoint_steps=1))
    done = torchrun(pair.folder / "worker.py", pair.folder, "fail", cwd=pair.folder)
    assert done.returncode != 0
    assert "a process fails" in done.stderr
    assert find_checkpoint(pair.folder / "fail", "last").name == "step-00000002", "earlier checkpoints are kept"


COMMAND = (sys.executable, "-c", "from gridcap.train.cli import train_decoder; train_decoder()", "--epochs", "3")


def write_pipeline(pair, name):
    """Write a pipeline.yaml for the run with the given name."""
    section = json.loads(pair.config(name).train.model_dump_json())
    splits = {split: {"images": "images", "annotations": f"{split}.json"} for split in ("train", "val")}
    tree = {"data": {"features_dir": ".", "splits": splits}, "train": section}
    (pair.folder / "pipeline.yaml").write_text(yaml.safe_dump(tree))


@pytest.mark.slow
@pytest.mark.usefixtures("slurm")
def test_two_slurm_tasks_train_the_same_weights_as_one_process(pair):
    write_pipeline(pair, "tasks")
    environment = os.environ | {"PYTHONPATH": str(Path.cwd()), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["srun", "--ntasks=2", *COMMAND],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        cwd=pair.folder,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("done: ") == 1
    assert_close(pair.folder / "tasks", pair.folder / "one")


@pytest.mark.slow
def test_command_runs_under_torchrun(pair):
    write_pipeline(pair, "command")
    done = torchrun("--no-python", *COMMAND, cwd=pair.folder)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("done: ") == done.stdout.count("configuration: ") == 1
    assert len([line for line in done.stdout.splitlines() if line.startswith("epoch ")]) == 3
    assert_close(pair.folder / "command", pair.folder / "one")


# --- gradient accumulation ---


@pytest.mark.parametrize("accumulate", [2, 3])
def test_gradient_accumulation_does_not_change_the_result(pair, accumulate):
    output = f"accumulate {accumulate}"
    fit(pair.config(output, grad_accum_steps=accumulate), *pair.data, False, progress=False)
    assert_close(pair.folder / output, pair.folder / "one")


def test_gradient_accumulation_runs_small_batches_and_one_optimizer_step(pair, monkeypatch):
    """Each batch is processed separately, followed by one optimizer step."""
    sizes, optimizer_steps = [], []
    real_objective, real_step = gridcap.train.objectives.cross_entropy.CrossEntropy.__call__, torch.optim.Adam.step
    monkeypatch.setattr(
        "gridcap.train.objectives.cross_entropy.CrossEntropy.__call__",
        lambda s, d, batch, e: (sizes.append(len(batch.images)), real_objective(s, d, batch, e))[1],
    )
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda *args: (optimizer_steps.append(len(sizes)), real_step(*args))[1]
    )
    fit(pair.config("batches", grad_accum_steps=3, epochs=1), *pair.data, False, progress=False)
    assert sizes == [2, 2, 2, 2, 2, 2, 1]
    assert optimizer_steps == [3, 6, 7]
