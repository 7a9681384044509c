"""How the modules lie and import each other, what chapter 1 needs, the help of every program."""

import ast
import runpy
import subprocess
import sys
from dataclasses import fields
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sample_t2i
import train_mnist
import train_t2i
from common.settings import flag

ROOT = Path(__file__).parents[1]
ORDER = """\
rf
mmdit
common.muon
common.cpu
common.start
common.settings
common.memory
common.log
common.pictures
inputs.digits
inputs.shapes
inputs.encoders
inputs.sources
inputs.stored
inputs.rows
inputs.stage
common.auraflow
common.pipeline
common.evaluate
common.retrieval
train_mnist
sample_t2i
train_t2i
tools
experiments""".splitlines()
FILES = {  # module → file
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in (".", "common", "inputs", "tools", "experiments")
    for path in (ROOT / folder).glob("*.py")
}
SETTINGS = {module.__name__: module.Settings for module in (train_mnist, train_t2i, sample_t2i)}
PROGRAMS = [name for name, path in FILES.items() if "__main__" in path.read_text()]


def place(module):
    """Its number in ORDER: tools, and experiments, share one."""
    folder = module.partition(".")[0]
    return ORDER.index(folder if folder in ORDER else module)


def imports(tree):
    """The modules of ours that a part of a file imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & FILES.keys()


def test_modules_import_earlier_ones_at_the_top_alone():
    assert len(list(ROOT.glob("*.py"))) <= 5
    graph = {}
    for module, path in FILES.items():
        source = path.read_text()
        tree = ast.parse(source)
        graph[module] = imports(tree)
        assert "sys.path" not in source
        for other in graph[module]:
            assert place(other) <= place(module), f"{module} imports {other}"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert not imports(node), f"{module}: {node.name} imports ours"
    TopologicalSorter(graph).prepare()  # raises at a circle
    assert {place(module) for module in FILES} == set(range(len(ORDER)))


def test_chapter_1_needs_no_large_package_and_nothing_that_windows_lacks(tmp_path):
    """A dry run, which leaves nothing."""
    script = """
import signal, sys
absent = "deepspeed datasets diffusers transformers pyarrow fsspec fcntl"
sys.modules |= dict.fromkeys(absent.split())
del signal.SIGUSR1, signal.SIGCHLD
import train_mnist
train_mnist.main(["--data", "glyphs", "--dry-run", "--out", sys.argv[1]])
"""
    out = tmp_path / "run"
    command = [sys.executable, "-c", script, out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "dry run passed" in done.stdout, done.stderr
    assert not out.exists()


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_has_its_help(program, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FILES[program]), run_name="__main__")
    said = capsys.readouterr().out
    assert ended.value.code == 0 and said.startswith("usage:")
    settings = SETTINGS.get(program)
    for option in fields(settings) if settings else ():
        name = option.name if option.metadata["positional"] else flag(option.name)
        assert option.metadata["text"] and name in said
