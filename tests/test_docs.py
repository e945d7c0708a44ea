"""What the README says is so: its commands run, and its snippets print what stands below them."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from inference_rl.inference import ROUTINES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.strip().splitlines()]
SNIPPETS = [
    (text, BLOCKS[i + 1][1] if i + 1 < len(BLOCKS) and BLOCKS[i + 1][0] == "text" else None)
    for i, (kind, text) in enumerate(BLOCKS)
    if kind == "python"
]
INSTALL = "python3 -m venv .venv && .venv/bin/pip install -e {} && .venv/bin/{}"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model files that the README shows."""
    path = tmp_path_factory.mktemp("readme")
    for text, _ in SNIPPETS:
        if found := re.match(r"# (\w+\.py)\n", text):
            (path / found[1]).write_text(text)
    return path


def test_the_first_two_commands_are_the_promised_ones() -> None:
    job = "inference-rl infer FrozenLake-v1 exact --temperature 0.1"
    assert COMMANDS[0] == INSTALL.format(".", job)
    assert COMMANDS[1] == INSTALL.format("'.[test]'", "pytest")
    assert COMMANDS[1] in (ROOT / ".ci/run").read_text()


def runnable() -> list[str]:
    """Commands as they are typed once the package is installed; the tests do not run themselves."""
    shown = [command.rpartition("&& .venv/bin/")[2] or command for command in COMMANDS]
    return [command for command in shown if command != "pytest"]


@pytest.mark.parametrize("command", runnable())
def test_command_runs(command: str, workplace: Path) -> None:
    words = shlex.split(command)
    program = shutil.which(words[0], path=str(Path(sys.executable).parent))
    assert program is not None, f"{words[0]} is not installed"
    ran = subprocess.run([program, *words[1:]], cwd=workplace, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout


@pytest.mark.parametrize(("snippet", "printed"), SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet_prints_what_it_says(snippet: str, printed: str | None) -> None:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the posterior's policy assumes")
        exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})
    assert output.getvalue() == (printed or "")


def test_the_table_of_routines_is_complete() -> None:
    listed = re.findall(r"^\| `([\w-]+)` \|", README, flags=re.MULTILINE)
    assert listed == list(ROUTINES)
