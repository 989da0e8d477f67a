"""The scripts and the Kubernetes Job in docs/cluster.md."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from gridcap.extract.cli import main

DOCS = (Path(__file__).parents[3] / "docs" / "cluster.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCS, re.M | re.S)


@pytest.mark.parametrize("script", blocks("bash"))
def test_documented_scripts_parse_as_bash_and_use_existing_flags(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    command = re.search(r"extract-features (.*?[^\\])$", script, re.M | re.S)
    assert command, script
    assert set(re.findall(r"--[a-z-]+", command[1])) <= known_flags()


def test_documented_kubernetes_job_is_consistent() -> None:
    (text,) = blocks("yaml")
    job = yaml.safe_load(text)["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    program, *flags = container["command"]
    assert program == "extract-features"
    assert {flag.partition("=")[0] for flag in flags} <= known_flags()
    assert job["completionMode"] == "Indexed"
    assert f"--world-size={job['completions']}" in flags
    assert pod["restartPolicy"] == "Never", "podFailurePolicy requires it"
    assert pod["terminationGracePeriodSeconds"] >= 30
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def known_flags() -> set[str]:
    return {name for parameter in main.params for name in parameter.opts}
