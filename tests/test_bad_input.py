"""What cannot be meant ends in one line: each number of each command, each key of our files,
each file that is cut or has changed."""

import importlib
import json
import shutil
import types
import typing
from dataclasses import fields

import numpy as np
import pytest
import torch
from helpers import DIGITS, SHAPES, call, exported, opened, t2i
from test_digits import write_mnist
from test_layout import PROGRAMS
from test_pairs import make
from test_prepare import OPTIONS, pictures
from test_prepare import run as prepared

import train_mnist
import train_t2i
from common.pipeline import Exported, Pipeline, Record, checkpoints, settle_run
from common.settings import Checked, flag, hints_of
from inputs.rows import open_rows
from inputs.stored import Manifest, PairsHeader
from tools import prepare
from tools.prepare import Entry

# --- each number of each command -----------------------------------------------------------------

FREE = {"latent_scale", "latent_offset"}  # any finite number has a meaning
NUMBERS = {int: ("nan", "1.5", "x", "-9223372036854775809"), float: ("nan", "inf", "-inf", "x")}


def kind_of(hint):
    """int of `int | None`, of `list[int]` and of `Annotated[int, …]`."""
    while typing.get_args(hint):
        hint = typing.get_args(hint)[0]
    return hint


def rule_of(hint):
    """What is annotated."""
    for part in typing.get_args(hint):
        if isinstance(part, dict):
            return part
        if found := rule_of(part):
            return found
    return {}


def bad_numbers():
    for program in PROGRAMS:
        settings = getattr(importlib.import_module(program), "Settings", None)
        for f in fields(settings) if settings else ():
            kind, rule = kind_of(hints_of(settings)[f.name]), f.metadata
            if kind not in NUMBERS or rule["positional"]:
                continue
            bounds = {name: rule[name] for name in ("least", "above", "most")}
            assert f.name in FREE or rule["choices"] or set(bounds.values()) != {None}, flag(f.name)
            values = list(NUMBERS[kind])
            if bounds["least"] is not None:
                values += [kind(bounds["least"] - 1), *([0] if bounds["least"] > 0 else [])]
            if bounds["above"] is not None:
                values += [bounds["above"], bounds["above"] - 1]
            if bounds["most"] is not None:
                values += [bounds["most"] + 1]
            if rule["choices"]:
                values += [max(rule["choices"]) + 1]
            for value in dict.fromkeys(map(str, values)):
                yield pytest.param(program, f.name, value, id=f"{program} {flag(f.name)} {value}")


@pytest.mark.parametrize("program, name, value", bad_numbers())
def test_a_number_that_cannot_be(tmp_path, monkeypatch, capsys, program, name, value):
    module, argv = importlib.import_module(program), []
    for f in fields(module.Settings):
        hint = hints_of(module.Settings)[f.name]
        if f.metadata["positional"] and typing.get_origin(hint) is not list:
            argv.append(next(iter(f.metadata["choices"] or ["x"])))
        elif f.metadata["default"] is None and not isinstance(hint, types.UnionType):
            argv += [flag(f.name), "x"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        module.main([*argv, f"{flag(name)}={value}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1 and flag(name) in line and not list(tmp_path.iterdir())


# --- each key of each of our JSON files ----------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run of each chapter, a prepared folder, pairs."""
    home = tmp_path_factory.mktemp("home")
    write_mnist(home)
    exported(home / "shapes", SHAPES)
    quick = "--device cpu --steps 2 --batch-size 2 --preset digits-narrow --sample-steps 1"
    how = ["--data", "mnist", "--data-dir", home, "--out", home / "mnist"]
    call(train_mnist.main, *quick.split(), *how)
    quick = "--threads 1 --samples 4 --batch-size 2 --eval-prompts 1 --sample-steps 1"
    call(t2i, *quick.split(), "--data", "mnist", *how[2:4], "--out", home / "t2i")
    (home / "checkpoint").symlink_to(checkpoints(home / "t2i/checkpoints")[-1])
    source = pictures(home / "source", 12, lines=[{"file_name": "none.png", "text": "a"}])
    prepared(source, home / "data", "--bad-limit", 1)  # one row is left out
    make(exported(home / "first", DIGITS), home / "pairs")
    return home


def resumed(folder):
    record = train_t2i.whole_record(folder)
    settle_run(train_t2i.Settings, {}, record, "cpu", train_t2i.recipe_of)


def prepared_again(folder):
    source = folder.parent / "home" / "source"
    args = prepare.Settings(str(source), folder, **prepare.parse(prepare.Settings, OPTIONS, ""))
    prepare.same_settings(args, prepare.open_source(args))


FILES = {  # name → folder, file, its class, what reads it
    "config.json": ("shapes", "config.json", Exported, Pipeline.open),
    "manifest.json": ("data", "manifest.json", Manifest, opened),
    "pairs.json": ("pairs", "pairs.json", PairsHeader, opened),
    "run.json": ("checkpoint", "run.json", Record, resumed),
    "chunk": (
        "data",
        "chunks/00000.json",
        Entry,
        lambda f: prepare.finish([f / "chunks/00000.json"], {}),
    ),
}


def bad_values(cls, path=()):
    """(keys, value) for each key that cls declares, and inside of it; DELETED: the key is gone."""
    for f in fields(cls):
        hint, rule = hints_of(cls)[f.name], rule_of(hints_of(cls)[f.name])
        here, kind = (*path, f.name), kind_of(hint)
        several = typing.get_origin(hint) is list
        yield here, DELETED
        values = [True, {}, [{}] if several else []]
        values += [7] if several or kind not in NUMBERS else ["7"]
        values += [] if isinstance(hint, types.UnionType) else [None]
        if kind is dict:
            values.remove({})
        if kind in NUMBERS:
            low = rule.get("least", None), rule.get("above", None)
            wrong = [2**63] if kind is int else [np.nan] * (not rule.get("nan"))
            wrong += [bound - 1 for bound in low if bound is not None]
            wrong += [1.5] if kind is int else []
            values += [[x] for x in wrong] if several else wrong
        if rule.get("choices"):
            values += ["other" if kind is str else 99]
        for value in values:
            yield here, value
        if isinstance(kind, type) and issubclass(kind, Checked):
            inside = (*here, 0) if several else here
            yield from bad_values(kind, inside)


DELETED = object()


def bad_keys():
    for name, (_, _, cls, _) in FILES.items():
        for path, value in bad_values(cls):
            if "text_format" in path and name != "manifest.json":
                continue  # of none of these runs
            said = "gone" if value is DELETED else repr(value)
            yield pytest.param(name, path, value, id=f"{name} {'.'.join(map(str, path))} {said}")


@pytest.mark.parametrize("name, path, value", bad_keys())
def test_a_key_that_cannot_be(home, tmp_path, name, path, value):
    folder, file, _, read = FILES[name]
    folder = shutil.copytree(home / folder, tmp_path / "copy")
    content = json.loads((folder / file).read_text())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if value is DELETED:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ValueError) as refused:
        read(folder)
    assert file in str(refused.value) and path[-1] in str(refused.value)
    assert "\n" not in str(refused.value)


# --- each binary file, cut or with a changed byte ------------------------------------------------


def weights(file):
    return Pipeline.open(file.parent).model.state_dict()


def averages(file):
    return Pipeline.open(file.parent, ema=0.05).model.state_dict()


def state(file):
    """What a resumed run of chapter 1 restores."""
    typed = train_mnist.parse(train_mnist.Settings, ["--out", str(file.parent), "--resume"], "")
    found = train_mnist.load(file, "cpu")
    device = torch.device("cpu")
    settings, rows = settle_run(train_mnist.Settings, typed, found, device, lambda _: {})
    model, adamw = train_mnist.build(settings, rows, found, device)
    return {"rows": found["rows"], "step": found["step"], "log": found["log"]} | {
        f"{i} {name}": x
        for i, state in enumerate(adamw.state_dict()["state"].values())
        for name, x in (model.state_dict() | state).items()
    }


def rows_of(file):
    rows = open_rows([str(file.parents["chunks" in str(file)])])
    source = rows.sources[0]
    if hasattr(source, "about"):
        return dict(enumerate(source.items(np.arange(source.about["number"]))))
    source.seed, source.number = 0, 0
    numbers = np.arange(source.firsts[-1])
    each = [source.read(numbers[i : i + 1]) for i in numbers]
    return {"images": each, "words": source.captions(numbers)}


def flat(value):
    """Tensors as bytes, however deep they lie."""
    if isinstance(value, dict):
        return {key: flat(x) for key, x in value.items()}
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    return [flat(x) for x in value] if isinstance(value, list | tuple) else value


BINARY = {
    "weights": ("shapes", "model.safetensors", weights),
    "chapter 1's checkpoint": ("mnist", "checkpoint.pt", state),
    "shard": ("checkpoint", "zero_pp_rank_0_mp_rank_00_optim_states.pt", averages),
    "module": ("checkpoint", "mp_rank_00_model_states.pt", averages),
    "chunk": ("data", "chunks/00000.arrow", rows_of),
    "pairs": ("pairs", "00000.safetensors", rows_of),
}


@pytest.mark.parametrize("how", ["cut", "empty", "zeros", *range(8)])
@pytest.mark.parametrize("name", BINARY)
def test_a_file_that_has_changed(home, tmp_path, name, how):
    """Zeros: 200 of them in its middle. A number seeds the byte; where no value lies, it may."""
    folder, file, read = BINARY[name]
    wanted = read(home / folder / file)
    path = shutil.copytree(home / folder, tmp_path / "copy") / file
    content = bytearray(path.read_bytes())
    if how == "zeros":
        middle = len(content) // 2
        middle += content[middle:].index(content[middle:].strip(bytes(1))[0])  # no zero
        content[middle : middle + 200] = bytes(200)
    elif how in ("cut", "empty"):
        del content[0 if how == "empty" else len(content) // 2 :]
    else:
        content[np.random.default_rng(how).integers(len(content))] ^= 1 << how
    path.write_bytes(content)
    try:
        found = read(path)
    except (ValueError, OSError) as error:
        assert "\n" not in str(error) and (
            path.name in str(error) or str(path.parent) in str(error)
        )
        return
    assert isinstance(how, int) and flat(found) == flat(wanted)
