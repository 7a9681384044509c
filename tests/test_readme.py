"""README and docs/: code that runs as it stands, commands that exist, links that lead on."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from common.settings import parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", page.read_text())


def test_the_whole_idea_runs_as_it_stands():
    seeded = "import torch; torch.manual_seed(0)\n"  # a point in fifteen ends between the two
    code = seeded + blocks(PAGES[0], "python")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    numbers = [float(x) for x in re.findall(r"-?\d+\.\d+", done.stdout)]
    assert len(numbers) == 10, done.stderr
    for x, y in zip(numbers[::2], numbers[1::2], strict=True):
        assert x * y > 0 and max(abs(abs(x) - 1), abs(abs(y) - 1)) < 0.7


def commands() -> list[str]:
    found = set()
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                found |= {part.strip(" &") for part in line.partition("#")[0].split("&&")}
    return sorted(c for c in found if re.search(r"\w+\.py|-m \w+\.\w+", c) and "srun" not in c)


@pytest.mark.parametrize("command", commands())
def test_a_command_has_the_options_that_it_is_given(command):
    words = shlex.split(command.partition(" -- ")[0])
    at = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "-m")
    name = words[at + 1] if words[at] == "-m" else words[at].removesuffix(".py")
    argv = words[at + 1 + (words[at] == "-m") :]
    module = importlib.import_module(name)
    if hasattr(module, "Settings"):
        parse(module.Settings, argv, "")
    else:
        done = subprocess.run([sys.executable, "-m", name, "--help"], cwd=ROOT, capture_output=True)
        options = {word.partition("=")[0] for word in argv if word.startswith("--")}
        assert options <= set(re.findall(r"--[\w-]+", done.stdout.decode()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
