"""The tables of docs/configuration.md, from the dataclasses: `python -m launch.config_docs`; `--check` only compares.

A key's meaning is the docstring under its field, its default and type are the field's own. What stands above the marker in
the page is written by hand and kept.
"""

import argparse
import ast
import dataclasses
import functools
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from launch.compose import CONFIGS, compose_config, groups, options, section
from steerscale.data.prepare import PrepareConfig
from steerscale.errors import ConfigError
from steerscale.tokenizers.config import TokenizerConfig
from steerscale.train.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "configuration.md"
MARKER = "<!-- From here on written by `python -m launch.config_docs`. -->"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or with --check say whether it is current; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m launch.config_docs", description="Write docs/configuration.md.")
    parser.add_argument("--check", action="store_true", help="only say whether it is current (exit status 1 if not)")
    args = parser.parse_args(argv)
    old = TARGET.read_text(encoding="utf-8")
    text = render(old)
    if not args.check:
        TARGET.write_text(text, encoding="utf-8")
    if not args.check or text == old:
        return 0
    print(f"{TARGET} is not current: run `python -m launch.config_docs`", file=sys.stderr)
    return 1


def render(page: str) -> str:
    """The page with its tables made anew."""
    by_hand, marker, _ = page.partition(MARKER)
    if not marker:
        raise ConfigError(f"{TARGET} lacks the line {MARKER!r}, after which the tables go")
    parts = [by_hand + marker, "", "## Groups", "", *_groups(), "", "## Keys", ""]
    parts += _section(RunConfig, "")
    parts += ["## Options of `steerscale tokenizer train` and `steerscale data prepare`", ""]
    parts += ["The same dataclasses stand behind these commands; `--help` lists the options.", ""]
    for title, cls in (("tokenizer train", TokenizerConfig), ("data prepare", PrepareConfig)):
        parts += [f"### `{title}`", "", *_table(cls, ""), ""]
    return "\n".join(parts).rstrip() + "\n"


def field_docs(cls: type) -> dict[str, str]:
    """Field name -> the docstring under it. Raises ConfigError if a field has none."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for node, after in zip(tree.body, [*tree.body[1:], None]):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if not (
            isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
        ):
            raise ConfigError(f"{cls.__name__}.{node.target.id} has no docstring: say what it means, with its unit")
        docs[node.target.id] = " ".join(after.value.value.split())
    return docs


def _groups() -> list[str]:
    lines = ["| group | option | what it is |", "|---|---|---|"]
    for group in groups():
        described = {option: _first_comment(CONFIGS / group / f"{option}.yaml") for option in options(group)}
        lines += [f"| `{group}=` | `{option}` | {_escape(text)} |" for option, text in described.items()]
    return lines


def _first_comment(path: Path) -> str:
    comments = [line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    return next(comment for comment in comments if not comment.startswith("@package"))


def _section(cls: type, at: str) -> list[str]:
    """Heading and table of a section, then those of the sections inside it."""
    title = f"### `{at}`" if at else "### Top level"
    lines = [title, "", _escape(" ".join(inspect.cleandoc(cls.__doc__ or "").split())), "", *_table(cls, at), ""]
    for name, hint in typing.get_type_hints(cls).items():
        nested = section(hint)
        if nested is not None:
            lines += _section(nested, f"{at}.{name}" if at else name)
    return lines


def _table(cls: type, at: str) -> list[str]:
    docs, hints = field_docs(cls), typing.get_type_hints(cls)
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        if section(hints[field.name]) is not None and field.default is not None:
            continue  # it has a table of its own
        key = f"{at}.{field.name}" if at else field.name
        cells = (f"`{key}`", _type(hints[field.name]), _default(field, key), _escape(docs[field.name]))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _type(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join("`null`" if option is type(None) else _type(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        item = _type(typing.get_args(hint)[0])
        return f"list of {item.replace('list', 'lists', 1) if item.startswith('list') else item.replace('number', 'numbers')}"
    if typing.get_origin(hint) is dict:
        return f"mapping to {_type(typing.get_args(hint)[1])}"
    if dataclasses.is_dataclass(hint):
        return "section"
    return {bool: "true or false", int: "whole number", float: "number", str: "text"}[hint]


def _default(field: dataclasses.Field, key: str) -> str:
    value = field.default if field.default is not dataclasses.MISSING else None
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is dataclasses.MISSING:
        chosen = _chosen(key)
        return (
            "required" if chosen is None else f"`{chosen}` ({'configs/train.yaml' if '.' not in key else 'model=demo'})"
        )
    return f"`{yaml.safe_dump(value, default_flow_style=True).removesuffix(chr(10)).removesuffix('...').strip()}`"


def _chosen(key: str) -> Any:
    """What configs/ gives a key that has no default in the code; None if nothing does."""
    text = yaml.safe_load((CONFIGS / "train.yaml").read_text(encoding="utf-8"))
    if key in text:
        return text[key]
    value: Any = _composed()
    for part in key.split("."):
        value = (value or {}).get(part)
    return None if value == "???" else value


@functools.cache
def _composed() -> dict[str, Any]:
    return compose_config([], partial=True)


def _escape(text: str) -> str:
    # Docstrings speak Python, users write YAML.
    return re.sub(r"`?\bNone\b`?", "`null`", text.replace("|", "\\|"))


if __name__ == "__main__":
    sys.exit(main())
