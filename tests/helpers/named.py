"""Checks that what a text names exists: files, modules, links, configuration keys, commands and their options.

Each `wrong_...` returns what does not exist. tests/test_docs.py applies them to every comment, docstring, message and page.
Exempt are FOREIGN and EXAMPLE_KEYS, and nothing else.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import yaml
from pydantic import BaseModel

from launch.cli import build_parser
from launch.commands.verbs import LONG_NAMES
from pipeline.config.run import RunConfig
from pipeline.sweep.config import SweepConfig
from pldr_model.config import ModelConfig

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("pipeline", "launch", "pldr_model", "tests")
FOLDERS = (*PACKAGES, "docs", "configs")
FILE = re.compile(r"(?<![\w/.:{-])(?:\.\./)*(?:[\w.-]+/)*[\w*.-]+\.(?:py|md)\b(?!\.?\w)")
FOLDER = re.compile(rf"(?<![\w/.:-])(?:{'|'.join(FOLDERS)})/[\w./*{{}},-]*[\w*}}]")
MODULE = re.compile(rf"(?<![\w/.-])(?:{'|'.join(PACKAGES)})(?:\.[A-Za-z_]\w*)+(?![\w/])")
FOREIGN = {"launch.py": "of DeepSpeed's launcher"}  # not files of this repository, and why
LINK = re.compile(r"\]\(([^)\s]+)\)")


def _inner(annotation: Any) -> Any:
    """The section in an annotation such as `list[Source]`, None where it has none."""
    for part in get_args(annotation):
        if (found := _inner(part)) is not None:
            return found
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel | ModelConfig)
    return annotation if is_section else None


SECTIONS = [name for name, field in RunConfig.model_fields.items() if _inner(field.annotation) is field.annotation]
MENTION = re.compile(rf"(?<![\w/.@-])((?:{'|'.join(SECTIONS)})(?:\.[A-Za-z_]+)+)(?![\w/(])")
OVERRIDE = re.compile(r"(?<=\s)([a-z_]+(?:\.\w+)*)=")
TOP = {*RunConfig.model_fields, "extends"}
EXAMPLE_KEYS = {"model.g_symmetric": "CONTRIBUTING.md adds it"}  # not keys, and why
# What `model.safetensors` ends with, which is not a key.
FILE_ENDINGS = {"safetensors", "sbatch", "json", "jsonl", "html", "log", "py", "yaml", "md", "npy"}

COMMAND = re.compile(r"(?:`|^    (?:.*; do )?(?:\.venv/bin/)?)pldr ([^`#\n]+)", flags=re.MULTILINE)


class Claim(NamedTuple):
    """A text that may name things, and where it stands."""

    path: Path
    line: int
    text: str


def comments_and_strings(path: Path, source: str) -> Iterator[Claim]:
    """Comments, docstrings and messages; of a test's other strings, which are data, only the modules that they name."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield Claim(path, token.start[0], token.string)
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            data = "tests" in path.parts and id(node) not in docstrings
            yield Claim(path, node.lineno, " ".join(MODULE.findall(node.value)) if data else node.value)


def claims(path: Path) -> list[Claim]:
    """Everything in a file that may name things."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return list(comments_and_strings(path, text))
    return [Claim(path, number, line) for number, line in enumerate(text.splitlines(), 1)]


@cache
def names() -> dict[str, int]:
    """How often each file name occurs in the repository."""
    counted: dict[str, int] = {}
    for path in [*ROOT.glob("*.*"), *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.*"))]:
        if "__pycache__" not in path.parts:
            counted[path.name] = counted.get(path.name, 0) + 1
    return counted


def expand(name: str) -> list[str]:
    """`a/{b,c}.py` -> both; `{stage}` and `NAME` stand for anything."""
    name = name.replace("NAME", "*")
    found = re.search(r"\{([^{}]*)\}", name)
    if found is None:
        return [name]
    choices = found[1].split(",") if "," in found[1] else ["*"]
    return [rest for choice in choices for rest in expand(name[: found.start()] + choice + name[found.end() :])]


def missing_file(name: str, where: Path) -> bool:
    if name in FOREIGN:
        return False
    if any(list(base.glob(name)) if "*" in name else (base / name).exists() for base in (ROOT, where.parent)):
        return False
    return "/" in name or "*" in name or names().get(name, 0) != 1


def defined_in(path: Path) -> set[str]:
    """Names that a module defines or imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def missing_module(name: str) -> bool:
    parts, place = name.split("."), ROOT
    for number, part in enumerate(parts):
        if (place / part).is_dir():
            place /= part
            continue
        if (place / f"{part}.py").is_file():
            rest = parts[number + 1 :]
            return bool(rest) and rest[0] not in defined_in(place / f"{part}.py")
        init = place / "__init__.py"
        return not init.is_file() or part not in defined_in(init)
    return False


def wrong_names(claim: Claim) -> list[str]:
    """Files and modules that a text names and that do not exist."""
    text = re.sub(r"\w+://\S+", "", claim.text)
    files = {name for match in [*FILE.findall(text), *FOLDER.findall(text)] for name in expand(match)}
    found = {name for name in files if missing_file(name, claim.path)}
    modules = {
        name for name in MODULE.findall(text) if name.rsplit(".", 1)[-1] not in FILE_ENDINGS
    }  # `launch.py` is a file
    return sorted(found | {name for name in modules if missing_module(name)})


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    heads = re.findall(r"^#+ +(.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def wrong_links(page: Path, text: str) -> list[str]:
    wrong = []
    for link in LINK.findall(text):
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        if "://" not in link and (not target.exists() or (anchor and anchor not in anchors(target))):
            wrong.append(link)
    return wrong


def known(key: str) -> bool:
    """Whether a dotted key is one of a run's configuration."""
    section: Any = RunConfig
    for part in key.split("."):
        if section is None:
            return False
        fields = {name: field.annotation for name, field in getattr(section, "model_fields", {}).items()}
        if section is ModelConfig:
            fields = dict.fromkeys(ModelConfig.__dataclass_fields__)
        if part not in fields:
            return False
        if get_origin(fields[part]) is dict:  # keys of the user's own
            return True
        section = _inner(fields[part])
    return True


def mentioned_keys(text: str) -> set[str]:
    return {
        key for key in MENTION.findall(text) if key.rsplit(".", 1)[-1] not in FILE_ENDINGS and key not in EXAMPLE_KEYS
    }


def code_blocks(text: str) -> list[str]:
    """Indented and fenced blocks."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:(?<=\n\n)|\A)((?:(?:    .*)?\n)*    .*\n?)", text)
    return [*fenced, *(re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in indented)]


def yaml_keys(tree: Any, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                yield from yaml_keys(inner, f"{prefix}{key}.")


def wrong_keys(text: str) -> list[str]:
    """Configuration keys that a page names, sets on a command line or in a YAML, and that do not exist."""
    wrong = {key for key in mentioned_keys(text) if not known(key)}
    for block in code_blocks(text):
        for line in block.splitlines():
            if re.match(r"(\.venv/bin/)?pldr |.*; do pldr ", line):
                set_here = set(OVERRIDE.findall(line.partition(" #")[0])) - {"key"}  # `[key=value ...]`
                wrong |= {key for key in set_here - set(EXAMPLE_KEYS) if not known(key)}
        if not re.match(r"\w+:( |\n)", block):
            continue
        try:
            tree = yaml.safe_load(block)
        except yaml.YAMLError:
            wrong.add(f"not YAML: {block.splitlines()[0]}")
            continue
        if set(tree) & {"config", "grid"}:  # a sweep
            wrong |= {key for key in tree if key not in SweepConfig.model_fields}
            wrong |= {key for part in ("set", "grid") for key in tree.get(part, {}) if not known(key)}
        else:
            wrong |= {key for key in yaml_keys(tree) if key not in TOP and not known(key)}
    return sorted(wrong)


@cache
def _parser() -> argparse.ArgumentParser:
    return build_parser()


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def wrong_commands(text: str) -> list[str]:
    """`pldr VERB [VERB] --option` whose verb or option the parser does not have."""
    wrong, top = [], _parser()
    for command in COMMAND.findall(text):
        words = command.replace("\\|", "|").split()
        if not words[0][0].islower():  # an option, a placeholder, a value in an f-string
            continue
        for verb in words[0].split("|"):
            parser = subcommands(top).get(verb)
            inner = subcommands(parser) if parser else {}
            second = words[1].split("|") if len(words) > 1 else []
            if " ".join([verb, *second]) in LONG_NAMES:  # two words that are one verb
                parser = subcommands(top).get(" ".join([verb, *second]))
            if inner and second and second[0][0].islower():
                parsers = [inner.get(name) for name in second]
            else:
                parsers = [parser, *inner.values()] if inner else [parser]
            if None in parsers:
                wrong.append(f"pldr {command.strip()}")
                continue
            options = {option for p in parsers if p for option in p._option_string_actions}
            used = {word.strip("[],.;)").split("=")[0] for word in words if re.match(r"\[?--[a-z]", word)}
            wrong += [f"pldr {verb} {option}" for option in sorted(used - options)]
    return wrong
