"""SETTINGS: one dataclass a program, one line an option. Nothing else knows the options.

    class Settings(Options):
        lr: float = option(6e-3, "learning rate at the base width", above=0, fixed=True)

From that line come --lr and its help, its default, its check, what a run saves of it, and whether a
resumed run must agree. parse() returns only what was typed; settle() fills in the rest:

    typed        what the command line says
    saved        what the run to resume was started with
    facts        what the rows have settled, say the size of their pictures: nothing contradicts it
    defaults     the preset's recipe, the run to start from, the rows' own habits; then the field's

The first of these that knows a value gives it. A typed value that contradicts a fact or a saved
value is an error and is never passed over.
"""

import argparse
import math
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path


def option(
    default,
    text: str,
    *,
    choices: Collection[str] | None = None,
    least: float | None = None,
    above: float | None = None,
    fixed: bool = False,
    local: bool = False,
    group: str | None = None,
    positional: bool = False,
):
    """A field of Options. None as the default: derived later, or absent. Where the type does not
    allow None, the option must be given.

    text: its line in --help. choices, least, above: what is allowed. fixed: a resumed run must have
    the same. local: of this call, not of the run: it is not saved. group: a heading in --help, for
    this option and those after it. positional: given without its name.
    """
    if not text:
        raise ValueError("an option needs its line of help")
    about = {"text": text, "choices": choices, "least": least, "above": above, "default": default}
    about |= {"fixed": fixed, "local": local, "group": group, "positional": positional}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=about)
    return field(default=default, metadata=about)


def flag(name: str) -> str:
    return "--" + name.rstrip("_").replace("_", "-")


@dataclass(frozen=True)
class Options:
    """A program's settings. A bad value raises ValueError: the option, the value, the rule."""

    def __post_init__(self):
        for f in fields(self):
            values, rule = getattr(self, f.name), f.metadata
            for value in values if isinstance(values, list) else [values]:
                if value is not None and rule["choices"] and value not in rule["choices"]:
                    names = ", ".join(map(str, rule["choices"]))
                    raise ValueError(f"{flag(f.name)} {value!r} must be one of {names}")
                if isinstance(value, float) and not math.isfinite(value):
                    raise ValueError(f"{flag(f.name)} {value} must be finite")
                if value is not None and rule["least"] is not None and value < rule["least"]:
                    raise ValueError(f"{flag(f.name)} {value} must be at least {rule['least']}")
                if value is not None and rule["above"] is not None and value <= rule["above"]:
                    raise ValueError(f"{flag(f.name)} {value} must be above {rule['above']}")

    def saved(self) -> dict:
        """What a run keeps of them: JSON values."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata["local"]}
        return {k: str(v) if isinstance(v, Path) else v for k, v in kept.items()}


def parse(
    cls: type[Options], argv: Sequence[str] | None, about: str, recipes: Mapping[str, dict] = {}
) -> dict:
    """The command line → name → value, only of what was typed. recipes: preset → its defaults."""
    parser = argparse.ArgumentParser(
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    group, hints = parser, typing.get_type_hints(cls)
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
    return {name: value for name, value in typed.items() if value != "auto"}


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
