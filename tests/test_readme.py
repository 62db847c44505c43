"""README and CONTRIBUTING against the code: commands, options, environment variables and files that they name exist."""

import re
from pathlib import Path

import click
import pytest

from benchmarks.__main__ import PROVIDER_NAMES
from benchmarks.__main__ import main as benchmarks_main
from benchmarks.exits import Exit
from benchmarks.peers import PROVIDERS
from benchmarks.suites import SUITES
from kernels import settings
from tuner.cli import main as tuner_main
from tuner.workloads import SHIPPED

ROOT = Path(__file__).parents[1]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}
OTHERS = {
    "CONTRIBUTING.md": {"--check", "--every-binary"},
    "README.md": {"--head", "--port", "--address", "--array", "--cpus-per-task", "--wrap"},
}
"""Options of ruff and of the tests; of ray and sbatch."""
COMMANDS = {"tuner": tuner_main, "benchmarks": benchmarks_main}


def subcommands(text: str) -> list[tuple[str, str]]:
    """(package, subcommand) of every `python -m package subcommand`, and of what follows it between dots in a table."""
    found = []
    for package, first, rest in re.findall(r"python -m (tuner|benchmarks) ([a-z-]+)[^`\n]*((?:`? · `[a-z-]+[^`]*)*)", text):
        found += [(package, first), *((package, name) for name in re.findall(r"· `([a-z-]+)", rest))]
    return found


@pytest.mark.parametrize("name", TEXTS)
def test_commands_exist(name):
    found = subcommands(TEXTS[name])
    assert ("tuner", "sweep") in found
    for package, command in found:
        assert command in COMMANDS[package].commands, f"{name} names `python -m {package} {command}`"


def test_readme_names_every_command():
    found = set(subcommands(TEXTS["README.md"]))
    assert found == {(package, command) for package, group in COMMANDS.items() for command in group.commands}


@pytest.mark.parametrize("name", TEXTS)
def test_options_exist(name):
    known = set(OTHERS[name])
    for group in COMMANDS.values():
        for command in group.commands.values():
            known |= {option for param in command.params if isinstance(param, click.Option) for option in param.opts}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", TEXTS[name])) <= known


def test_workloads_and_variables_exist():
    for workload in SHIPPED:
        assert (ROOT / "tuner" / "workloads" / f"{workload}.yaml").is_file()
    source = Path(settings.__file__).read_text(encoding="utf-8")
    assert set(re.findall(r"RMSNORM_[A-Z_]+", TEXTS["README.md"])) == set(re.findall(r"RMSNORM_[A-Z_]+", source))


@pytest.mark.parametrize("name", TEXTS)
def test_files_exist(name):
    for path in re.findall(r"`((?:kernels|tuner|tuning_db|benchmarks|tests)/[\w./]+)`", TEXTS[name]):
        assert (ROOT / path).exists(), f"{name} names {path}"


def test_the_two_commands_stand_on_the_first_screen():
    first_screen = "\n".join(TEXTS["README.md"].splitlines()[:45])
    assert "python -m pip install -e . && python -m tuner sweep" in first_screen
    assert 'python -m pip install -e ".[test]" && pytest -n auto' in first_screen


def test_exit_codes_and_suites_are_documented():
    assert [int(code) for code in re.findall(r"^\| (\d) \|", TEXTS["README.md"], flags=re.MULTILINE)] == [int(code) for code in Exit]
    for suite in SUITES:
        assert f"`{suite}`" in TEXTS["README.md"]
        assert (ROOT / "benchmarks" / "suites" / f"{suite}.yaml").is_file()


def test_the_command_line_knows_every_provider():
    assert tuple(PROVIDERS) == PROVIDER_NAMES
