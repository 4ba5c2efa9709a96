"""The house rules that a machine can check: lint, types, floors, and nothing that executes foreign data."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = Path(sys.executable).parent
SOURCES = sorted((ROOT / "lightslim").rglob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy", "lint-imports"])
def test_tools_find_nothing(command):
    name, *arguments = command.split()
    run = subprocess.run([str(TOOLS / name), *arguments], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_executes_foreign_data_or_outgrows_a_screenful_of_ideas(path):
    text = path.read_text()
    forbidden = r"\byaml\.(unsafe_|full_)?load\b|\bpickle\b|(?<![.\w])(eval|exec)\(|weights_only=False"
    assert not re.search(forbidden, text)
    assert text.count("\n") <= 400
    assert text.startswith('"""')
