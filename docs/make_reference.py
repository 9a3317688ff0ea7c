"""Writes docs/reference/ from the code: study file, plug-ins, commands, results.json, messages, codes.

python docs/make_reference.py            tests/test_reference.py is red where the pages say something else
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
import json
import re
import textwrap
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from concilium import catalog, errors, messages
from concilium.cli import app
from concilium.constraints import LIST_RANGES, OPTION_RANGES, RANGES
from concilium.data.division_rules import DIVISION_RANGES
from concilium.data.partition import Partition
from concilium.data.shifts import Shift
from concilium.deployment.kits import SiteSettings
from concilium.study import ForecastTable, SiteTable, StartTable, Study, tables
from concilium.study._lists import LISTS
from concilium.study.reading import PLUG_INS

FOLDER = Path(__file__).parent / "reference"
MADE = "Made from the code by `python docs/make_reference.py`. Do not edit."
OWN_TABLES = {"engines", "exports"}
"""Kinds whose functions have parameters that are no keys of a plug-in's table."""


def pages() -> dict[str, str]:
    """File name -> text of every page of the reference."""
    return {
        "study.md": study(),
        "plug-ins.md": plug_ins(),
        "commands.md": commands(),
        "results.md": results(),
        "messages.md": what_travels(),
        "codes.md": codes(),
    }


# ------------------------------------------------------------------------------------------------------------ in Markdown


def page(title: str, *parts: str) -> str:
    """A page of the reference."""
    return "\n\n".join([f"# {title}", MADE, *parts]) + "\n"


def grid(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table."""
    lines = [list(header), *([str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def words(known: Iterable[str]) -> str:
    """A list of words in alphabetical order."""
    return ", ".join(f"`{word}`" for word in sorted(known))


def code(value: Any) -> str:
    """A value as it stands in a TOML file."""
    match value:
        case None | dataclasses.MISSING:
            return ""
        case bool():
            return f"`{str(value).lower()}`"
        case str():
            return f'`"{value}"`'
        case tuple() | list():
            return f"`{json.dumps(list(value))}`"
    return f"`{value}`"


# --------------------------------------------------------------------------------------------------------- the study file


def meanings(cls: type) -> dict[str, str]:
    """Field of a dataclass -> the text below it."""
    (body,) = (
        node.body for node in ast.parse(textwrap.dedent(inspect.getsource(cls))).body if isinstance(node, ast.ClassDef)
    )
    found = {}
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[ast.unparse(field.target)] = " ".join(str(below.value.value).split())
    return found


def keys(cls: type, where: str, *, without: Iterable[str] = ()) -> str:
    """The keys of one table of the study file."""
    hints, said = typing.get_type_hints(cls), meanings(cls)
    return grid(
        ("key", "type", "default", "meaning"),
        (
            (
                f"`{f.name}`",
                allowed(where, f.name, hints[f.name]),
                "**required**" if required(f) else code(f.default),
                said.get(f.name, ""),
            )
            for f in dataclasses.fields(cls)
            if f.name not in without
        ),
    )


def required(field: dataclasses.Field[Any]) -> bool:
    """Whether a table must have this key."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def allowed(where: str, key: str, annotation: Any) -> str:
    """Type of a value, and its range."""
    spelt = catalog.spell(annotation)
    full = f"{where} {key}"
    _, text = (
        RANGES.get(full) or DIVISION_RANGES.get(full) or OPTION_RANGES.get(full) or LIST_RANGES.get(full) or (None, "")
    )
    return spelt + (f": {text}" if text else "")


def study() -> str:
    """study.md: every table and key."""
    hints = typing.get_type_hints(Study)
    said = meanings(Study)
    parts = [
        "A study is one TOML file. Paths in it are relative to it. A key or table that is not here is refused, with the nearest "
        "known one; all errors of a file are told at once. The run folder's `study.toml` has every default filled in."
    ]
    for f in dataclasses.fields(Study):
        title, where = (f"[{f.name}]", f"[{f.name}]")
        if f.name == "sites":
            parts += ["## [sites.NAME]", "One table for each site.", keys(SiteTable, "[sites.NAME]", without=["shift"])]
            parts += ["### [sites.NAME.shift]", first(Shift.__doc__), keys(Shift, "[sites.NAME.shift]")]
        elif f.name == "test":
            parts += ["## [test]", "The held-out set, never used for selection. Keys as those of a site."]
        elif f.name == "variants":
            parts += ["## [variants.NAME.TABLE]", said["variants"]]
        elif f.name in ("partition", "forecast"):
            cls = {"partition": Partition, "forecast": ForecastTable}[f.name]
            parts += [f"## {title}", said[f.name], keys(cls, where)]
        elif f.name in PLUG_INS:
            kind = PLUG_INS[f.name]
            known = ", ".join(f"`{name}`" for name in catalog.names(kind))
            parts += [
                f"## {title}",
                f'`name` ({known}, or `"module:function"`; default {code(f.default.name)}) and '
                f"[its options](plug-ins.md#{kind}).",
            ]
            if f.name == "network":
                parts += [f"Beside them: {first(StartTable.__doc__)}", keys(StartTable, where)]
        elif f.name in LISTS:
            known = ", ".join(f"`{name}`" for name in catalog.names(LISTS[f.name]))
            parts += [
                f"## [[{f.name}]]",
                f'{said[f.name]} Each table: `name` ({known}, or `"module:function"`) and '
                f"[its options](plug-ins.md#{LISTS[f.name]}). In a variant `{f.name} = []` takes them out.",
            ]
        elif f.name != "start":
            parts += [f"## {title}", keys(hints[f.name], where, without=["options"])]
    return page("The study file", *parts)


# ------------------------------------------------------------------------------------------------------------- plug-ins


def first(text: str | None) -> str:
    """The first paragraph, on one line."""
    return " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split())


def capital(text: str) -> str:
    """The text with a capital, unless it begins with code."""
    return text[:1].upper() + text[1:]


def arguments(function: Any) -> dict[str, str]:
    """Parameter -> what the section Args of the docstring says of it."""
    section = re.search(r"^Args:\n((?: {4}.*\n?)+)", inspect.getdoc(function) or "", re.MULTILINE)
    found: dict[str, str] = {}
    for line in textwrap.dedent(section[1]).splitlines() if section else []:
        if entry := re.match(r"(\w+(?:, \w+)*): (.*)", line):
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        elif found:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def plug_ins() -> str:
    """plug-ins.md: every kind, what its files are, their options."""
    parts = [
        "The file's name is the name in the study file; `module:function` names code from outside. To write one: CONTRIBUTING.md."
    ]
    for kind in sorted(catalog.ENTRIES):
        parts += [f"## {kind}", first(importlib.import_module(f"concilium.{kind}").__doc__)]
        table = next((f"[{table}]" for table, of in PLUG_INS.items() if of == kind), "")
        table = next((f"[[{key}]]" for key, of in LISTS.items() if of == kind), table)
        for name in catalog.names(kind):
            module = importlib.import_module(f"concilium.{kind}.{name}")
            about = inspect.cleandoc(module.__doc__ or "").split("\n\n")
            parts += [f"### {name}", *(" ".join(p.split()) for p in about[: 2 if kind == "protocols" else 1])]
            options = {} if kind in OWN_TABLES else catalog.options(kind, name)
            said = arguments(catalog.load(kind, name))
            if options:
                parts += [] if said.keys() >= options.keys() else [first(catalog.load(kind, name).__doc__)]
                rows = (
                    (
                        f"`{key}`",
                        allowed(table, key, p.annotation),
                        "**required**" if p.default is p.empty else code(p.default),
                        capital(said.get(key, "")),
                    )
                    for key, p in options.items()
                )
                parts.append(grid(("option", "type", "default", "meaning"), rows))
    return page("Plug-ins", *parts)


# -------------------------------------------------------------------------------------------------------------- commands


def commands() -> str:
    """commands.md: every command with its arguments and options."""
    group = typer.main.get_command(app)
    parts = ["What ends how: [codes](codes.md). Every command has `--help`."]
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        parts += [f"## concilium {name}", first(command.help), grid(("", "default", ""), parameters(command))]
    return page("Commands", *parts)


def parameters(command: Any) -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning of what a command takes."""
    for p in command.params:
        if "--help" in p.opts:
            continue
        given = (
            (p.metavar or p.name.upper())
            if p.param_type_name == "argument"
            else ", ".join([*p.opts, *p.secondary_opts])
        )
        default = "**required**" if p.required else "" if p.default in (None, False, ()) else f"`{p.default}`"
        yield f"`{given}`", default, p.help or ""


# ---------------------------------------------------------------------------------------------------- results and messages


def results() -> str:
    """results.md: the schema of results.json."""
    text = (Path(inspect.getfile(errors)).parent / "results.schema.json").read_text(encoding="utf-8")
    schema = json.loads(text)
    rows = [(f"`{key}`", kind_of(s, schema), s.get("description", "")) for key, s in schema["properties"].items()]
    parts = [
        "The schema is `src/concilium/results.schema.json`. How means and intervals are made: [statistics](../statistics.md).",
        grid(("key", "type", "meaning"), rows),
    ]
    for key, of in schema["properties"].items():
        fields = of.get("items", {}).get("properties", {})
        if fields:
            inner = [(f"`{name}`", kind_of(s, schema), s.get("description", "")) for name, s in fields.items()]
            parts += [f"## {key}", of.get("description", ""), grid(("key", "type", "meaning"), inner)]
    return page("results.json", *parts)


def kind_of(of: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """The type of a value of results.json in words."""
    if "$ref" in of:
        of = schema["$defs"][of["$ref"].rpartition("/")[2]]
    if "enum" in of:
        return ", ".join(code(value) for value in of["enum"])
    kinds = of.get("type", "integer")
    return " or ".join(kinds) if isinstance(kinds, list) else str(kinds)


def what_travels() -> str:
    """messages.md: every type that may cross a site's boundary."""
    parts = [
        "What a site may be asked and may answer, and nothing else. In words: [what leaves a site](../what-leaves-a-site.md)."
    ]
    inside = [t for t in vars(messages).values() if dataclasses.is_dataclass(t) and isinstance(t, type)]
    shown = {"Replies": messages.REPLIES, "Failures": messages.FAILURES, "Requests": messages.REQUESTS}
    listed = {t for group in shown.values() for t in group}
    for title, group in (shown | {"Inside them": tuple(t for t in inside if t not in listed)}).items():
        parts.append(f"## {title}")
        for of in group:
            text = first(of.__doc__) if not (of.__doc__ or "").startswith(f"{of.__name__}(") else ""
            said = meanings(of)
            rows = [(f"`{f.name}`", f"`{f.type}`", said.get(f.name, "")) for f in dataclasses.fields(of)]
            parts += [
                f"### {of.__name__}",
                *([text] if text else []),
                *([grid(("field", "type", "meaning"), rows)] if rows else []),
            ]
    return page("Messages", *parts)


def codes() -> str:
    """codes.md: exit codes, and the words that may leave a site where something fails."""
    known = [("0", "", "Done as asked.")]
    for of in sorted(errors.ConciliumError.__subclasses__(), key=lambda of: of.exit_code):
        known.append((str(of.exit_code), f"`{of.__name__}`", first(of.__doc__)))
    known.append(("130", "", "Stopped from the keyboard; `--resume` goes on."))
    settings = keys(SiteSettings, "site.toml")
    return page(
        "Codes",
        "## Exit codes",
        "A run that is finished, but not as asked (a site was lost), ends with 4 too; `results.json` says what.",
        grid(("code", "error", "meaning"), known),
        "## Why a case or a data set cannot be used",
        f"What a site tells of it: {words(errors.CODES)}. What `concilium check` says: [check](../check.md).",
        "## What a site's policy forbids",
        f"The rule that a refusal names: {words(errors.RULES)}.",
        "## site.toml",
        first(SiteSettings.__doc__) + " It lies in the kit's `local` ([between hospitals](../between-hospitals.md)).",
        settings,
    )


def undocumented() -> list[str]:
    """Keys of the study file without a meaning."""
    classes = [
        t
        for t in vars(tables).values()
        if dataclasses.is_dataclass(t) and isinstance(t, type) and t.__module__ == tables.__name__
    ]
    classes = [t for t in classes if t is not Study] + [Partition, Shift]
    return [f"{t.__name__}.{f.name}" for t in classes for f in dataclasses.fields(t) if f.name not in meanings(t)]


def main() -> None:
    """Write the pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
