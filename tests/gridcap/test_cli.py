"""The gridcap command group: subcommands, names in messages, lists, and shell completion."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from gridcap.cli import COMMANDS, main
from gridcap.common.config import load_config, recipe_names


@pytest.fixture(autouse=True)
def empty_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def output_of(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_help_lists_every_subcommand_with_its_summary() -> None:
    lines = output_of("--help").partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines] == list(COMMANDS)
    assert all(len(line.split()) > 3 and len(line) <= 80 for line in lines)
    assert not [line for line in lines if line.endswith("...")], "the first sentence of a docstring is too long"
    expected = "download encoders extract import inspect verify recipes train evaluate caption serve"
    assert list(COMMANDS) == expected.split()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_subcommand_is_that_of_the_command_and_names_it_as_invoked(name: str) -> None:
    text = output_of(name, "--help")
    assert text.startswith(f"Usage: gridcap {name} ")
    examples = text.partition("Examples:\n")[2].strip().splitlines()
    assert f"gridcap {name}" in examples[0]
    for entry_point in ("extract-features", "train-decoder", "evaluate-decoder", "caption-images"):
        assert entry_point not in text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_texts_are_lower_case_phrases_without_a_final_period(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    for param in command.get_params(click.Context(command)):
        if isinstance(param, click.Option):
            text = param.help or ""
            phrase = text.partition("  [")[0]
            assert phrase, param.opts[0]
            assert not phrase.removesuffix("...").endswith("."), f"{param.opts[0]}: {text}"
            word = phrase.split()[0]
            assert word[0].islower() or word[1:2].isupper() or word[0].isdigit(), f"{param.opts[0]}: {text}"


def test_errors_name_the_command_as_invoked() -> None:
    result = run("extract")
    assert result.exit_code == 2
    assert "gridcap extract --help" in result.stderr
    assert "extract-features" not in result.stderr


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("extract-features", "extract"), ("trian", "train"), ("caption-images", "caption"), ("eval", "evaluate")],
)
def test_an_unknown_subcommand_suggests_one(name: str, suggestion: str) -> None:
    result = run(name)
    assert result.exit_code == 2
    assert f"no such command: {name}; did you mean {suggestion}?" in result.stderr


def test_an_unknown_subcommand_unlike_any_other_lists_them() -> None:
    assert "commands: download, " in run("zzz").stderr


def test_recipes_are_listed_with_their_source() -> None:
    lines = output_of("recipes").splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert all(" et al. " in line for line in lines)


@pytest.mark.parametrize("name", recipe_names())
def test_a_printed_recipe_can_be_used_as_a_file(name: str) -> None:
    Path(f"{name}.yaml").write_text(output_of("recipes", name))
    assert load_config(recipe=f"{name}.yaml") == load_config(recipe=name)


def test_an_unknown_recipe_suggests_one() -> None:
    result = run("recipes", "topdown")
    assert result.exit_code == 2
    assert "did you mean top-down?" in result.stderr


def test_encoders_are_listed_with_grid_and_input_size() -> None:
    text = output_of("encoders")
    assert ["inception_v3", "8", "x", "8", "x", "2048", "299", "x", "299"] in [
        line.split() for line in text.splitlines()
    ]
    names = [line.split()[0] for line in output_of("encoders", "resnet*").splitlines()[1:]]
    assert names
    assert all(name.startswith("resnet") for name in names)
    assert run("encoders", "vgg*").exit_code == 2


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "completion"), [("gridcap ser", "serve"), ("gridcap train --learning", "--learning-rate")]
)
def test_shell_completion(words: str, completion: str) -> None:
    code = "from gridcap.cli import main; main(prog_name='gridcap')"
    environment = {
        **os.environ,
        "_GRIDCAP_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert [line.partition(",")[2] for line in done.stdout.splitlines()] == [completion], done.stderr
