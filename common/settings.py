"""SETTINGS: one dataclass a program, one line an option. Nothing else knows the options.

    class Settings(Options):
        size: int = option(20, "pixels a side", least=1, fixed=True)

From that line come --size and its help, its default, its check, what a run saves of it, and whether
a resumed run may change it. parse() returns only what was typed; settle() fills in the rest:

    typed        what the command line says
    saved        what the run to resume was started with
    facts        what the rows have settled, say the size of their pictures: nothing contradicts it
    defaults     the preset's recipe, the run to start from, the rows' own habits; then the field's

The first of these that knows a value gives it. A typed value that contradicts a fact, or the saved
value of a fixed option, is an error and is never passed over. All other options may change when a
run is resumed; changes() says which did.

The JSON files that our programs write are declared in the same way (Checked, rule) and read in one
place (read_json). So a wrong value ends in one line wherever it stands, before any work is done.
"""

import argparse
import functools
import json
import math
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import ge, gt, le
from pathlib import Path

# ------------------------------------------------------------------------------------------------
# Values: each has a type and a rule
# ------------------------------------------------------------------------------------------------


BOUNDS = {"least": (ge, "at least"), "above": (gt, "above"), "most": (le, "at most")}


def rule(
    *,
    choices: Collection | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    nan: bool = False,
) -> dict:
    """What a value, or each value of a list, may be: for the metadata of a dataclass's field."""
    return {"choices": choices, "least": least, "above": above, "most": most, "nan": nan}


NO_RULE = rule()
# Types of the fields of Checked:
Count = typing.Annotated[int, rule(least=1)]
Natural = typing.Annotated[int, rule(least=0)]
Positive = typing.Annotated[float, rule(above=0)]
NotNegative = typing.Annotated[float, rule(least=0)]


def check(name: str, value, kind, allowed: Mapping = NO_RULE):
    """ValueError in one line, name, value and rule, unless the value is of the kind (a type hint).

    An integer fits 64 bits, a number is finite: nothing that we compute goes on with NaN.
    """
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and types.NoneType in kinds:
        return
    kind = kinds[0]
    if typing.get_origin(kind) is typing.Annotated:
        kind, allowed = typing.get_args(kind)
    if typing.get_origin(kind) is list and isinstance(value, list):
        for each in value:
            check(name, each, typing.get_args(kind)[0], allowed)
        return
    if isinstance(kind, type) and issubclass(kind, Checked) and isinstance(value, dict):
        return fitting(kind, value, f"{name}: ")
    base = typing.get_origin(kind) or kind
    takes = {float: (int, float), Path: (str, Path)}.get(base, base)
    if not isinstance(value, takes) or (type(value) is bool and base is not bool):
        said = {float: "a number", int: "a whole number", str: "text", list: "a list"}
        meant = said.get(base, "an object" if issubclass(base, dict | Checked) else base.__name__)
        raise ValueError(f"{name} {value!r:.80} must be {meant}")
    if allowed["choices"] and value not in allowed["choices"]:
        names = ", ".join(map(str, allowed["choices"]))
        raise ValueError(f"{name} {value!r} must be one of {names}")
    if type(value) not in (int, float):
        return
    if not math.isfinite(value) and not allowed["nan"]:
        raise ValueError(f"{name} {value} must be finite")
    if kind is int and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} {value} must be below 2^63")
    for bound, (holds, words) in BOUNDS.items():
        if allowed[bound] is not None and not holds(value, allowed[bound]):
            raise ValueError(f"{name} {value} must be {words} {allowed[bound]}")


@functools.cache
def hints_of(cls: type) -> dict:
    """Name → type of its fields."""
    return typing.get_type_hints(cls, include_extras=True)


class Checked:
    """A dataclass whose values are checked when it is made: a JSON object of one of our files."""

    @staticmethod
    def called(name: str) -> str:
        return f'"{name}"'

    def __post_init__(self):
        hints = hints_of(type(self))
        for f in fields(self):
            check(self.called(f.name), getattr(self, f.name), hints[f.name], f.metadata or NO_RULE)


def fitting(cls: type[Checked], values, where: str = "") -> dict:
    """The values, if they are a JSON object with what cls declares. ValueError if they are not."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}{values!r:.80} must be an object")
    for f in fields(cls):
        name = where + cls.called(f.name)
        if f.name not in values:
            raise ValueError(f"{name} is missing")
        check(name, values[f.name], hints_of(cls)[f.name], f.metadata or NO_RULE)
    return values


def read_json(path: Path, cls: type[Checked] | None = None) -> dict:
    """A JSON object that one of our programs wrote. OSError, or ValueError: file, key, rule."""
    return from_json(path.read_bytes(), path, cls)


def from_json(content: bytes, path, cls: type[Checked] | None = None) -> dict:
    try:
        values = json.loads(content)
        if cls is None and not isinstance(values, dict):
            raise ValueError(f"{values!r:.80} must be an object")
        return values if cls is None else fitting(cls, values)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or of another version: {error}") from error


# ------------------------------------------------------------------------------------------------
# Options
# ------------------------------------------------------------------------------------------------


def option(
    default,
    text: str,
    *,
    fixed: bool = False,
    local: bool = False,
    group: str | None = None,
    positional: bool = False,
    **allowed,
):
    """A field of Options. None as the default: derived later, or absent. Where the type does not
    allow None, the option must be given.

    text: its line in --help. allowed: see rule. fixed: a resumed run must have the same, because it
    decides what the network or a sample is. local: of this call, not of the run: it is not saved.
    group: a heading in --help, for this option and those after it. positional: given without its
    name.
    """
    if not text:
        raise ValueError("an option needs its line of help")
    about = rule(**allowed) | {"text": text, "default": default, "positional": positional}
    about |= {"fixed": fixed, "local": local, "group": group}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=about)
    return field(default=default, metadata=about)


def flag(name: str) -> str:
    return "--" + name.rstrip("_").replace("_", "-")


@dataclass(frozen=True)
class Options(Checked):
    """A program's settings. A bad value raises ValueError: the option, the value, the rule."""

    called = staticmethod(flag)

    def saved(self) -> dict:
        """What a run keeps of them: JSON values."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata["local"]}
        return {k: str(v) if isinstance(v, Path) else v for k, v in kept.items()}


@dataclass(frozen=True)
class Parted(Options):
    """Of programs whose work several processes may share: each makes pieces of its own, and the
    folder that all write to holds in the end what one process would have made."""

    part: str = option("0/1", "i/n: make every n-th piece of the work, from the i-th on (from 0)")

    def __post_init__(self):
        super().__post_init__()
        i, _, n = self.part.partition("/")
        if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
            raise ValueError(f"--part {self.part} must be i/n with 0 ≤ i < n, such as 0/2 and 1/2")

    @property
    def share(self) -> slice:
        """This process's pieces of a list of all: [2, 10, 18, …] for 2/8."""
        i, _, n = self.part.partition("/")
        return slice(int(i), None, int(n))


def parse(
    cls: type[Options], argv: Sequence[str] | None, about: str, recipes: Mapping[str, dict] = {}
) -> dict:
    """The command line → name → value, only of what was typed. recipes: preset → its defaults.

    ValueError in one line if it cannot be read, or a value is not allowed.
    """
    parser = argparse.ArgumentParser(
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.error = _refuse
    group, hints = parser, hints_of(cls)
    for f in fields(cls):
        rule, kind = f.metadata, hints[f.name]
        group = parser.add_argument_group(rule["group"]) if rule["group"] else group
        text, name = rule["text"], flag(f.name)
        if any(f.name in recipe for recipe in recipes.values()):
            each = (f"{preset} {r[f.name]}" for preset, r in recipes.items() if f.name in r)
            text += f" ({', '.join(each)})"
        elif rule["default"] not in (None, False, []):
            default = rule["default"]
            text += f" (default: {' '.join(default) if isinstance(default, list) else default})"
        text = text.replace("%", "%%")
        if kind in (bool, bool | None):
            action = "store_true" if kind is bool else argparse.BooleanOptionalAction
            group.add_argument(name, action=action, help=text)
            continue
        needed = rule["default"] is None and not isinstance(kind, types.UnionType)
        if isinstance(kind, types.UnionType):
            kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
        several = typing.get_origin(kind) is list
        kind = typing.get_args(kind)[0] if several else kind
        how = {"type": kind, "help": text, "metavar": name.rpartition("-")[2].upper()}
        if several:
            how |= {"nargs": "*" if rule["positional"] else "+", "action": "extend"}
        if rule["positional"]:
            group.add_argument(f.name, **how)
        else:
            group.add_argument(name, dest=f.name, required=needed, **how)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher's
    typed = vars(parser.parse_intermixed_args(argv))
    typed.pop("local_rank", None)
    for f in fields(cls):
        if typed.get(f.name) == f.metadata["default"] == "auto":  # else "auto" is a name
            del typed[f.name]
        if f.name in typed:
            check(cls.called(f.name), typed[f.name], hints[f.name], f.metadata)
    return typed


def _refuse(message: str):
    raise ValueError(f"{message}; see --help")


def settle(
    cls: type[Options], typed: dict, *, saved: dict, facts: dict, defaults: Sequence[dict]
) -> Options:
    """All settings of a run. ValueError in one line if two sources contradict each other.

    A fact may differ from what was saved, too: then the data have changed under the run.
    """
    values = {}
    for f in fields(cls):
        name = f.name
        if name in facts and typed.get(name, facts[name]) != facts[name]:
            raise ValueError(
                f"{flag(name)} {typed[name]} does not fit --data, which was made with"
                f" {facts[name]}: drop it, or prepare other data"
            )
        known = facts | typed if name not in facts else facts
        both = name in known and name in saved
        if f.metadata["fixed"] and both and saved[name] != known[name]:
            raise ValueError(
                f"{flag(name)} {known[name]} differs from the run to resume, which has"
                f" {saved[name]}: drop it, or start another run with --out"
            )
        for source in (facts, typed, {} if f.metadata["local"] else saved, *defaults):
            if name in source:
                values[name] = source[name]
                break
    return cls(**values)


def changes(saved: dict, settings: Options) -> str:
    """What a resumed run does otherwise, "--lr 0.004 -> 0.002; …". saved: {} in a new run."""
    now = settings.saved().items()
    return "; ".join(f"{flag(k)} {saved[k]} -> {v}" for k, v in now if saved.get(k, v) != v)
