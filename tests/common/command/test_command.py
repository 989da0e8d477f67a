"""Shared behavior of all commands: help, configuration, and error reporting."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from gridcap.common.command import (
    NO_SETTINGS,
    Uses,
    flag,
    pipeline_command,
    reject_ignored,
    reload_config,
    show_config,
)
from gridcap.common.command.command import ALL_SETTINGS
from gridcap.common.command.suggest import RENAMED_FLAGS, suggest_flags
from gridcap.common.config import PipelineConfig
from gridcap.common.errors import ConfigError, ExtractionError, GridcapError, StoreError, UserError
from gridcap.train.decoders.registry import DECODER_CONFIGS

EXAMPLES = """
try-it --batch-size 3            (another batch size)
try-it --name mine --dry-run     (no work)
"""

Body = Callable[[PipelineConfig, bool, "str | None"], Any]


def make_command(
    body: Body,
    own_keys: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    own_recipe: Callable[[dict[str, Any]], str | None] | None = None,
    uses: Uses = ALL_SETTINGS,
) -> click.Command:
    """Return a command with a flag of every type and an option of its own."""

    @pipeline_command("try-it", EXAMPLES, own_keys, own_recipe, uses)
    @flag("--batch-size", "extract.batch_size")
    @flag("--learning-rate", "train.learning_rate")
    @flag("--decoder", "train.decoder.family")
    @flag("--shuffle", "train.shuffle")
    @flag("--features", "train.features")
    @flag("--block-trigrams", "caption.block_trigrams")
    @click.option("--name", help="an option of its own")
    def try_it(config: PipelineConfig, dry_run: bool, name: str | None) -> Any:
        """Try something."""
        return body(config, dry_run, name)

    return try_it


def run(body: Body, *args: str, **more: Any) -> Result:
    return CliRunner().invoke(make_command(body, **more), list(args), prog_name="try-it")


def raising(error: BaseException) -> Body:
    def body(*_: object) -> None:
        raise error

    return body


def seen_config(*args: str, **more: Any) -> PipelineConfig:
    """Run the command and return the configuration that its function gets."""
    seen: list[PipelineConfig] = []
    result = run(lambda config, *_: seen.append(config), *args, **more)
    assert result.exit_code == 0, result.output
    return seen[0]


# ------------------------------------------------------------------------------------------------- --help


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_shows_defaults_and_one_example_per_line(option: str) -> None:
    result = CliRunner().invoke(make_command(raising(AssertionError())), [option], terminal_width=100)
    assert result.exit_code == 0
    words = " ".join(result.output.split())
    assert "Try something." in words
    assert "images per encoder batch" in words
    assert "[extract.batch_size]" in words
    assert "default: attention" in words
    assert "attention (recurrent, attends to the cells), lstm, transformer" in words
    assert "[rows|blocks]" in words
    assert "--block-trigrams / --no-block-trigrams" in words
    assert "[caption.block_trigrams; default: False]" in words
    assert "[train.features]" in words
    assert "None" not in words
    for line in EXAMPLES.strip().splitlines():
        assert f"  {line}\n" in result.output


def test_every_command_has_the_shared_options() -> None:
    shared = {"--config", "--set", "--dry-run", "--debug", "--version"}
    assert shared <= {name for param in make_command(raising(AssertionError())).params for name in param.opts}


def test_version_names_the_command() -> None:
    result = run(raising(AssertionError()), "--version")
    assert result.exit_code == 0
    assert result.output.startswith("try-it")


# ------------------------------------------------------------------------------------------ configuration


def test_a_command_gets_the_resolved_configuration() -> None:
    Path("pipeline.yaml").write_text("extract: {batch_size: 1, num_workers: 1}\ntrain: {epochs: 1}\n")
    config = seen_config("--batch-size", "3", "--set", "extract.num_workers=2", "--features", "f.h5")
    assert (config.extract.batch_size, config.extract.num_workers, config.train.epochs) == (3, 2, 1)
    assert config.train.features == Path("f.h5")


def test_flags_not_given_leave_the_file_alone() -> None:
    Path("mine.yaml").write_text("extract: {batch_size: 1}\n")
    assert seen_config("--config", "mine.yaml").extract.batch_size == 1


def test_a_command_gets_its_options_and_dry_run() -> None:
    seen: list[object] = []
    assert run(lambda _, dry_run, name: seen.extend([dry_run, name]), "--dry-run", "--name", "x").exit_code == 0
    assert run(lambda _, dry_run, name: seen.extend([dry_run, name])).exit_code == 0
    assert seen == [True, "x", False, None]


def test_own_options_can_set_keys() -> None:
    def split(values: dict[str, Any]) -> dict[str, Any]:
        return {f"data.splits.{values['name']}": {"images": "photos"}} if values["name"] else {}

    assert list(seen_config("--name", "mine", own_keys=split).data.splits) == ["mine"]
    assert seen_config(own_keys=split).data.splits == {}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(
    ("args", "expected"), [(["--block-trigrams"], True), (["--no-block-trigrams"], False), ([], None)]
)
def test_a_switch_overrides_the_file_in_both_directions(given: bool, args: list[str], expected: bool | None) -> None:
    Path("pipeline.yaml").write_text(f"caption: {{block_trigrams: {str(given).lower()}}}\n")
    assert seen_config(*args).caption.block_trigrams is (given if expected is None else expected)


def test_the_last_of_repeated_switches_wins() -> None:
    assert seen_config("--no-block-trigrams", "--block-trigrams").caption.block_trigrams
    assert not seen_config("--block-trigrams", "--no-block-trigrams").caption.block_trigrams


def test_own_options_can_choose_a_recipe() -> None:
    """The recipe overrides the file and is overridden by flags."""

    def choose(values: dict[str, Any]) -> str | None:
        assert set(values) == {"name", "dry_run"}
        name: str | None = values["name"]
        return name

    Path("pipeline.yaml").write_text("train: {epochs: 1, learning_rate: 0.5, batch_size: 1}\n")
    Path("mine.yaml").write_text("train: {epochs: 2, batch_size: 2, decoder: {family: lstm}}\n")
    plain = seen_config(own_recipe=choose).train
    assert (plain.epochs, plain.learning_rate, plain.batch_size) == (1, 0.5, 1)
    train = seen_config("--name", "mine.yaml", "--set", "train.batch_size=3", own_recipe=choose).train
    assert (train.epochs, train.learning_rate, train.batch_size, train.decoder.family) == (2, 7e-4, 3, "lstm")
    train = seen_config(
        "--name", "mine.yaml", "--learning-rate", "0.25", "--decoder", "attention", own_recipe=choose
    ).train
    assert (train.learning_rate, train.decoder.family) == (0.25, "attention")


def test_an_unknown_recipe_is_an_error_before_the_command_runs() -> None:
    result = run(raising(AssertionError("the command ran")), "--name", "x", own_recipe=lambda values: values["name"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --recipe x: no such recipe")
    assert "the command ran" not in result.stderr


def test_an_error_in_own_recipe_is_reported_like_any_other() -> None:
    def fail(values: dict[str, Any]) -> str | None:
        raise ConfigError("not both", "give one")

    result = run(raising(AssertionError("the command ran")), own_recipe=fail)
    assert result.exit_code == 2
    assert result.stderr == "error: not both\n  what to do: give one\n"


def test_reload_config_does_not_apply_the_recipe_again() -> None:
    """The saved configuration already contains the settings of the recipe."""
    Path("saved.yaml").write_text("train: {epochs: 2, decoder: {family: attention}}\n")
    seen: list[PipelineConfig] = []
    result = run(
        lambda *_: seen.append(reload_config(Path("saved.yaml"), DECODER_CONFIGS)),
        "--name",
        "transformer",
        own_recipe=lambda values: values["name"],
    )
    assert result.exit_code == 0, result.output
    assert (seen[0].train.epochs, seen[0].train.decoder.family) == (2, "attention")


def test_reload_config_applies_flags_and_set_to_another_file() -> None:
    Path("pipeline.yaml").write_text("train: {epochs: 1, batch_size: 1}\n")
    Path("saved.yaml").write_text("train: {epochs: 2, batch_size: 2, learning_rate: 0.5}\n")
    seen: list[PipelineConfig] = []
    result = run(
        lambda *_: seen.append(reload_config(Path("saved.yaml"), DECODER_CONFIGS)),
        "--learning-rate",
        "0.25",
        "--set",
        "train.batch_size=3",
    )
    assert result.exit_code == 0, result.output
    train = seen[0].train
    assert (train.epochs, train.batch_size, train.learning_rate) == (2, 3, 0.25)


def test_dry_run_shows_whole_sections() -> None:
    result = run(lambda config, *_: show_config(config, "caption", full=True))
    assert "  caption:\n    decoding: beam\n    beam_size: 3\n" in result.stdout
    assert "extract" not in result.stdout


def test_only_settings_that_differ_from_the_defaults_are_shown() -> None:
    result = run(lambda config, *_: show_config(config, "caption", "extract"), "--batch-size", "3")
    assert result.stdout == "configuration: extract.batch_size=3\n"
    result = run(lambda config, *_: show_config(config, "caption"), "--batch-size", "3")
    assert result.stdout == "configuration: all defaults\n"


def test_the_summary_of_many_settings_fits_into_two_lines() -> None:
    sets = [f"data.splits.split{i}.images=folder/of/images/{i}" for i in range(20)]
    result = run(lambda config, *_: show_config(config, "data"), *(word for text in sets for word in ("--set", text)))
    assert len(result.stdout) < 2 * 140
    assert "more (--dry-run shows all)" in result.stdout


def test_set_of_a_key_that_the_command_does_not_use_is_a_usage_error() -> None:
    uses = Uses(("extract", "train.device"), "extract.dtype=float32")
    assert run(lambda *_: None, "--set", "extract.dtype=float32", uses=uses).exit_code == 0
    assert run(lambda *_: None, "--set", "train.device=cpu", uses=uses).exit_code == 0
    assert run(lambda *_: None, "--set", "train={device: cpu}", uses=uses).exit_code == 0
    result = run(raising(AssertionError()), "--set", "caption.beam_size=2", uses=uses)
    assert result.exit_code == 2
    assert "error: --set caption.beam_size=2: try-it does not use caption.beam_size" in result.stderr
    assert "unknown key" in run(raising(AssertionError()), "--set", "beam_sise=2", uses=uses).stderr


def test_help_of_set_shows_a_key_that_the_command_uses() -> None:
    command = make_command(raising(AssertionError()), uses=Uses(("extract",), "extract.dtype=float32"))
    words = " ".join(CliRunner().invoke(command, ["--help"], terminal_width=100).output.split())
    assert "set any key, for example extract.dtype=float32" in words


def test_a_command_without_settings_reads_no_file() -> None:
    Path("pipeline.yaml").write_text("not a section\n")
    command = make_command(lambda *_: None, uses=NO_SETTINGS)
    assert CliRunner().invoke(command, []).exit_code == 0
    names = {name for param in command.params for name in param.opts}
    assert {"--debug", "--dry-run"} <= names
    assert not {"--set", "--config"} & names


@pytest.mark.parametrize(
    ("args", "origin"),
    [
        (("--set", "data.splits.val={images: x}"), "--set data.splits.val={images: x}"),
        (("--set", "data={splits: {}}"), None),
        (("--batch-size", "3"), "--batch-size"),
        (("--learning-rate", "3"), None),
        ((), None),
    ],
)
def test_reject_ignored_names_the_flag_or_set_that_has_no_effect(args: tuple[str, ...], origin: str | None) -> None:
    keys = ("data.splits.val", "extract.batch_size")
    result = run(lambda *_: reject_ignored(keys, "with --images", "omit it"), *args)
    if origin is None:
        assert result.exit_code == 0, result.output
    else:
        assert result.exit_code == 2
        assert result.stderr == f"error: {origin}: has no effect with --images\n  what to do: omit it\n"


@pytest.mark.parametrize(
    "args",
    [
        ("--batch-size", "many"),
        ("--batch-size", "0"),
        ("--shuffle", "cards"),
        ("--block-trigrams", "yes"),
        ("--block-trigrams", "--set", "caption.block_trigrams=true"),
        ("--no-such-flag",),
        ("--set", "extract.batchsize=3"),
        ("--batch-size", "3", "--set", "extract.batch_size=3"),
    ],
)
def test_usage_errors_exit_with_2_before_the_command_runs(args: tuple[str, ...]) -> None:
    result = run(raising(AssertionError("the command ran")), *args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "the command ran" not in result.stderr
    assert "Traceback" not in result.stderr


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("features/train.h5: no such file", "create it with extract-features"), 2),
        (StoreError("features/train.h5: no such file", "create it with extract-features"), 1),
        (GridcapError("features/train.h5: no such file", "create it with extract-features"), 1),
        (ExtractionError("features/train.h5: no such file", "create it with extract-features"), 1),
    ],
)
def test_an_error_is_reported_as_a_message_and_a_hint(error: GridcapError, status: int) -> None:
    result = run(raising(error))
    assert result.exit_code == status
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "error: features/train.h5: no such file",
        "  what to do: create it with extract-features",
    ]


def test_debug_shows_the_traceback_before_the_message() -> None:
    result = run(raising(UserError("message", "hint")), "--debug")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("error: message\n  what to do: hint\n")


def test_debug_shows_the_traceback_of_configuration_errors() -> None:
    result = run(raising(AssertionError()), "--set", "sed=1", "--debug")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr


def test_an_unexpected_exception_is_an_internal_error() -> None:
    result = run(raising(ZeroDivisionError("division by zero")))
    assert result.exit_code == 1
    assert "error: ZeroDivisionError: division by zero" in result.stderr
    assert "--debug" in result.stderr
    assert "Traceback" not in result.stderr
    assert "ZeroDivisionError" in run(raising(ZeroDivisionError()), "--debug").stderr


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "permissions"),
        (errno.EROFS, "read-only"),
        (errno.ENOENT, "typos"),
        (errno.EIO, "dmesg"),
        (errno.ESTALE, "network file system"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EBADF, "--debug"),
    ],
)
def test_an_os_error_names_the_path_and_gives_a_hint(number: int, hint: str) -> None:
    result = run(raising(OSError(number, "a system error", "features/00003.h5")))
    assert result.exit_code == 1
    message, hint_line = result.stderr.splitlines()
    assert message == "error: features/00003.h5: a system error"
    assert hint in hint_line


def test_a_dangling_symlink_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to(tmp_path / "gone")
    result = run(lambda *_, **__: (tmp_path / "runs" / "x").mkdir(parents=True, exist_ok=True))
    assert result.exit_code == 1
    assert f"{tmp_path / 'runs'}: symlink to {tmp_path / 'gone'}, which does not exist" in result.stderr


def test_an_os_error_without_a_path_has_a_message() -> None:
    result = run(raising(OSError(errno.ENOSPC, "No space left on device")))
    assert result.exit_code == 1
    assert "error: No space left on device\n" in result.stderr


def test_ctrl_c_exits_with_130_and_without_traceback() -> None:
    result = run(raising(KeyboardInterrupt()))
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_stop_signals_run_cleanup_and_restore_handlers(number: signal.Signals) -> None:
    steps: list[str] = []

    def body(*_: object) -> None:
        try:
            signal.raise_signal(number)
        finally:
            steps.append("cleaned up")

    def previous(*_: object) -> None:
        steps.append("not intercepted")

    old = signal.signal(number, previous)
    try:
        result = run(body)
        assert signal.getsignal(number) is previous
    finally:
        signal.signal(number, old)
    assert steps == ["cleaned up"]
    assert result.exit_code == 128 + number
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("status", [0, 3])
def test_a_command_can_choose_its_exit_status(status: int) -> None:
    assert run(raising(SystemExit(status))).exit_code == status


def test_click_usage_errors_are_shown_by_click() -> None:
    result = run(raising(click.UsageError("not both")))
    assert result.exit_code == 2
    assert "Error: not both" in result.stderr


def test_a_closed_output_pipe_is_not_an_error() -> None:
    """caption-images photos/ | head -1"""
    result = run(raising(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    assert "error:" not in result.stderr


# --------------------------------------------------------------------------------------- unknown flags


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("--lr", "--learning-rate"),
        ("--batch", "--batch-size"),
        ("--size", "--batch-size"),
        ("--lerning-rate", "--learning-rate"),
        ("--no-block", "--no-block-trigrams"),
    ],
)
def test_item_23_an_unknown_flag_suggests_the_flag_that_is_meant(name: str, suggestion: str) -> None:
    result = run(raising(AssertionError()), name, "1")
    assert result.exit_code == 2
    assert f"no such option: {name}; did you mean {suggestion}?" in result.stderr


def test_item_23_a_flag_like_no_other_has_no_suggestion() -> None:
    assert "did you mean" not in run(raising(AssertionError()), "--zzz").stderr


def test_item_23_image_suggests_images() -> None:
    assert suggest_flags("--image", ["--images", "--mem", "--limit", "--image-size"])[:2] == [
        "--image-size",
        "--images",
    ]


@pytest.mark.parametrize(("old", "new"), sorted(RENAMED_FLAGS.items()))
def test_a_renamed_flag_suggests_its_new_name(old: str, new: str) -> None:
    assert suggest_flags(old, ["--help", "--output", new])[0] == new
    assert new not in suggest_flags(old, ["--help", "--output"])


# ----------------------------------------------------------------------------------- names of commands


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rerun extract-features or train-decoder --resume", "rerun gridcap extract or gridcap train --resume"),
        ("runs/train-decoder/x and my-extract-features", "runs/train-decoder/x and my-extract-features"),
    ],
)
def test_commands_are_named_as_invoked(text: str, expected: str) -> None:
    group = click.Group("gridcap", commands={"try": make_command(raising(UserError(text, text)))})
    result = CliRunner().invoke(group, ["try"])
    assert result.stderr == f"error: {expected}\n  what to do: {expected}\n"
    assert run(raising(UserError(text, text))).stderr == f"error: {text}\n  what to do: {text}\n"


# ------------------------------------------------------------------------------------------- memory


class OutOfMemoryError(RuntimeError):
    """Has the name of torch's exception."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
            "out of GPU memory: CUDA out of memory",
        ),
        (RuntimeError("CUDA error: out of memory"), "out of GPU memory"),
        (MemoryError(), "out of memory: MemoryError"),
        (MemoryError("Unable to allocate 2 GiB"), "out of memory: Unable to allocate 2 GiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "out of memory"),
        (RuntimeError("can't start new thread"), "out of memory: can't start new thread"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "out of memory: libtorch_cpu.so"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
    ],
)
def test_item_16_running_out_of_memory_is_not_an_internal_error(error: Exception, message: str) -> None:
    result = run(raising(error))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {message}")
    assert len(result.stderr.splitlines()) == 2
    assert "internal error" not in result.stderr
    assert "--batch-size" in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is enforced on Linux")
def test_item_16_an_exceeded_address_space_limit_is_reported_as_such(tmp_path: Path) -> None:
    code = """
import resource
import click
from gridcap.common.command import pipeline_command

@pipeline_command("x", "")
def command(config, dry_run):
    resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))
    bytearray(2**40)

command([])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: out of memory")


def test_item_16_a_locale_without_utf_8_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    code = "from gridcap.cli import main; main(['encoders'])"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: the locale encodes file names in ascii, not in UTF-8")
    assert "PYTHONUTF8=1" in done.stderr


@pytest.mark.parametrize(
    ("args", "source"),
    [
        (("--batch-size", "0"), "--batch-size: extract.batch_size: "),
        (("--set", "extract.batch_size=0"), "command line: extract.batch_size: "),
    ],
)
def test_item_23_an_invalid_value_names_the_flag_that_gives_it(args: tuple[str, ...], source: str) -> None:
    result = run(raising(AssertionError("the command ran")), *args)
    assert result.exit_code == 2
    assert f"error: {source}" in result.stderr
