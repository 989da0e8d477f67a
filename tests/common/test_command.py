"""What every command shares: --help, the configuration's flags, and how errors are shown."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from gridcap.common.command import flag, pipeline_command, reload_config, show_config
from gridcap.common.config import PipelineConfig
from gridcap.common.errors import ConfigError, ExtractionError, GridcapError, StoreError, UserError

EXAMPLES = """
try-it --batch-size 3            (a number of its own)
try-it --name mine --dry-run     (and nothing is done)
"""

Body = Callable[[PipelineConfig, bool, "str | None"], Any]


def make_command(
    body: Body,
    own_keys: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    own_recipe: Callable[[dict[str, Any]], str | None] | None = None,
) -> click.Command:
    """A command with a flag of every kind and an option of its own."""

    @pipeline_command("try-it", EXAMPLES, own_keys, own_recipe)
    @flag("--batch-size", "extract.batch_size")
    @flag("--learning-rate", "train.learning_rate")
    @flag("--decoder", "train.decoder.family")
    @flag("--features", "train.features")
    @flag("--block-trigrams", "caption.block_trigrams")
    @click.option("--name", help="An option of its own.")
    def try_it(config: PipelineConfig, dry_run: bool, name: str | None) -> Any:
        """Try a thing."""
        return body(config, dry_run, name)

    return try_it


def run(body: Body, *args: str, **more: Any) -> Result:
    return CliRunner().invoke(make_command(body, **more), list(args), prog_name="try-it")


def raising(error: BaseException) -> Body:
    def body(*_: object) -> None:
        raise error

    return body


def seen_config(*args: str, **more: Any) -> PipelineConfig:
    """The configuration that the command's function gets."""
    seen: list[PipelineConfig] = []
    result = run(lambda config, *_: seen.append(config), *args, **more)
    assert result.exit_code == 0, result.output
    return seen[0]


# ------------------------------------------------------------------------------------------------- --help


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_shows_examples_line_by_line_and_defaults(option: str) -> None:
    result = CliRunner().invoke(make_command(raising(AssertionError())), [option], terminal_width=100)
    assert result.exit_code == 0
    words = " ".join(result.output.split())
    assert "Try a thing." in words
    assert "images encoded together" in words
    assert "null: 32, on a GPU 256 [extract.batch_size]" in words
    assert "default: attention" in words
    assert "[attention|lstm|transformer]" in words
    assert "--block-trigrams / --no-block-trigrams" in words
    assert "[caption.block_trigrams; default: False]" in words
    assert "[train.features]" in words  # no default of its own: "default: None" would say nothing
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


def test_a_command_gets_its_own_options_and_dry_run() -> None:
    seen: list[object] = []
    assert run(lambda _, dry_run, name: seen.extend([dry_run, name]), "--dry-run", "--name", "x").exit_code == 0
    assert run(lambda _, dry_run, name: seen.extend([dry_run, name])).exit_code == 0
    assert seen == [True, "x", False, None]


def test_own_options_may_set_keys() -> None:
    def split(values: dict[str, Any]) -> dict[str, Any]:
        return {f"data.splits.{values['name']}": {"images": "photos"}} if values["name"] else {}

    assert list(seen_config("--name", "mine", own_keys=split).data.splits) == ["mine"]
    assert seen_config(own_keys=split).data.splits == {}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(
    ("args", "expected"), [(["--block-trigrams"], True), (["--no-block-trigrams"], False), ([], None)]
)
def test_a_switch_goes_over_the_file_either_way_and_left_out_leaves_it(
    given: bool, args: list[str], expected: bool | None
) -> None:
    Path("pipeline.yaml").write_text(f"caption: {{block_trigrams: {str(given).lower()}}}\n")
    assert seen_config(*args).caption.block_trigrams is (given if expected is None else expected)


def test_of_a_switch_given_twice_the_last_counts() -> None:
    assert seen_config("--no-block-trigrams", "--block-trigrams").caption.block_trigrams
    assert not seen_config("--block-trigrams", "--no-block-trigrams").caption.block_trigrams


def test_own_options_may_choose_a_recipe() -> None:
    """It goes over the file and under the flags, and is chosen from the command's own options."""

    def choose(values: dict[str, Any]) -> str | None:
        assert set(values) == {"name", "dry_run"}
        name: str | None = values["name"]
        return name

    Path("pipeline.yaml").write_text("train: {epochs: 1, learning_rate: 0.5, batch_size: 1}\n")
    Path("mine.yaml").write_text("train: {epochs: 2, batch_size: 2, decoder: {family: lstm}}\n")
    plain = seen_config(own_recipe=choose).train
    assert (plain.epochs, plain.learning_rate, plain.batch_size) == (1, 0.5, 1)
    train = seen_config("--name", "mine.yaml", "--set", "train.batch_size=3", own_recipe=choose).train
    assert (train.epochs, train.learning_rate, train.batch_size, train.decoder.family) == (2, 1e-3, 3, "lstm")
    train = seen_config(
        "--name", "mine.yaml", "--learning-rate", "0.25", "--decoder", "attention", own_recipe=choose
    ).train
    assert (train.learning_rate, train.decoder.family) == (0.25, "attention")


def test_a_wrong_recipe_is_an_error_before_anything_runs() -> None:
    result = run(raising(AssertionError("it ran")), "--name", "x", own_recipe=lambda values: values["name"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --recipe x: no such recipe")
    assert "it ran" not in result.stderr


def test_an_error_while_the_recipe_is_chosen_is_shown_like_any_other() -> None:
    def refuse(values: dict[str, Any]) -> str | None:
        raise ConfigError("not both", "give one")

    result = run(raising(AssertionError("it ran")), own_recipe=refuse)
    assert result.exit_code == 2
    assert result.stderr == "error: not both\n  what to do: give one\n"


def test_a_resumed_run_takes_no_recipe_again() -> None:
    """Its configuration holds what the recipe said, and what was changed since."""
    Path("saved.yaml").write_text("train: {epochs: 2, decoder: {family: attention}}\n")
    seen: list[PipelineConfig] = []
    result = run(
        lambda *_: seen.append(reload_config(Path("saved.yaml"))),
        "--name",
        "transformer",
        own_recipe=lambda values: values["name"],
    )
    assert result.exit_code == 0, result.output
    assert (seen[0].train.epochs, seen[0].train.decoder.family) == (2, "attention")


def test_a_run_is_resumed_with_its_own_configuration_and_the_flags_over_it() -> None:
    Path("pipeline.yaml").write_text("train: {epochs: 1, batch_size: 1}\n")
    Path("saved.yaml").write_text("train: {epochs: 2, batch_size: 2, learning_rate: 0.5}\n")
    seen: list[PipelineConfig] = []
    result = run(
        lambda *_: seen.append(reload_config(Path("saved.yaml"))),
        "--learning-rate",
        "0.25",
        "--set",
        "train.batch_size=3",
    )
    assert result.exit_code == 0, result.output
    train = seen[0].train
    assert (train.epochs, train.batch_size, train.learning_rate) == (2, 3, 0.25)


def test_the_configuration_is_shown_by_sections() -> None:
    result = run(lambda config, *_: show_config(config, "caption"))
    assert "  caption:\n    decoding: beam\n    beam_size: 3\n" in result.stdout
    assert "extract" not in result.stdout


@pytest.mark.parametrize(
    "args",
    [
        ("--batch-size", "many"),
        ("--batch-size", "0"),
        ("--decoder", "gpt"),
        ("--block-trigrams", "yes"),
        ("--block-trigrams", "--set", "caption.block_trigrams=true"),
        ("--no-such-flag",),
        ("--set", "extract.batchsize=3"),
        ("--batch-size", "3", "--set", "extract.batch_size=3"),
        ("--config", "nowhere.yaml"),
    ],
)
def test_wrong_use_exits_with_2_before_anything_runs(args: tuple[str, ...]) -> None:
    result = run(raising(AssertionError("it ran")), *args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "it ran" not in result.stderr
    assert "Traceback" not in result.stderr


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("features/train.h5: no such file", "make it with extract-features"), 2),
        (StoreError("features/train.h5: no such file", "make it with extract-features"), 2),
        (GridcapError("features/train.h5: no such file", "make it with extract-features"), 1),
        (ExtractionError("features/train.h5: no such file", "make it with extract-features"), 1),
    ],
)
def test_an_error_for_the_user_is_two_lines_and_no_traceback(error: GridcapError, status: int) -> None:
    result = run(raising(error))
    assert result.exit_code == status
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "error: features/train.h5: no such file",
        "  what to do: make it with extract-features",
    ]


def test_debug_shows_the_traceback_and_the_same_two_lines() -> None:
    result = run(raising(UserError("what is wrong", "what to do")), "--debug")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("error: what is wrong\n  what to do: what to do\n")


def test_debug_shows_the_traceback_of_a_bad_configuration_too() -> None:
    result = run(raising(AssertionError()), "--set", "sed=1", "--debug")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr


def test_an_unexpected_exception_exits_with_1_and_asks_for_a_report() -> None:
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
        (errno.ENOENT, "typing error"),
        (errno.EIO, "--debug"),
    ],
)
def test_an_os_error_names_the_path_and_what_to_do(number: int, hint: str) -> None:
    result = run(raising(OSError(number, "the system's words", "features/00003.h5")))
    assert result.exit_code == 1
    what, todo = result.stderr.splitlines()
    assert what == "error: features/00003.h5: the system's words"
    assert hint in todo


def test_a_link_to_nothing_in_the_place_of_a_folder_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to(tmp_path / "gone")
    result = run(lambda *_, **__: (tmp_path / "runs" / "x").mkdir(parents=True, exist_ok=True))
    assert result.exit_code == 1
    assert f"{tmp_path / 'runs'}: a link to {tmp_path / 'gone'}, which is not there" in result.stderr


def test_an_os_error_without_a_path_still_says_what() -> None:
    result = run(raising(OSError(errno.ENOSPC, "No space left on device")))
    assert result.exit_code == 1
    assert "error: No space left on device\n" in result.stderr


def test_an_interruption_exits_with_130_and_without_traceback() -> None:
    result = run(raising(KeyboardInterrupt()))
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_scheduler_that_stops_a_command_ends_it_like_ctrl_c(number: signal.Signals) -> None:
    """What is open is cleaned up on the way out, and the handler that was there before is back."""
    steps: list[str] = []

    def body(*_: object) -> None:
        try:
            signal.raise_signal(number)
        finally:
            steps.append("cleaned up")

    def before(*_: object) -> None:
        steps.append("not caught")

    old = signal.signal(number, before)
    try:
        result = run(body)
        assert signal.getsignal(number) is before
    finally:
        signal.signal(number, old)
    assert steps == ["cleaned up"]
    assert result.exit_code == 128 + number
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("status", [0, 3])
def test_a_command_may_choose_its_exit_status(status: int) -> None:
    assert run(raising(SystemExit(status))).exit_code == status


def test_a_usage_error_from_inside_a_command_is_shown_by_click() -> None:
    result = run(raising(click.UsageError("not both")))
    assert result.exit_code == 2
    assert "Error: not both" in result.stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    """caption-images photos/ | head -1"""
    result = run(raising(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    assert "error:" not in result.stderr
