"""docs/operate.md and README.md say what is there: commands, options, settings, files, tests, and messages that are raised."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main
from prefect.settings import Settings

from infra import cli, stack_plan

ROOT = Path(__file__).parents[2]
OPERATE, README = ROOT / "docs/operate.md", ROOT / "README.md"
PACKAGES = ("blocks", "contracts", "deployments", "flows", "infra", "tasks")
OTHER_SOURCES = (ROOT / "prefect.yaml", ROOT / "infra/compose.yaml", ROOT / "infra/Dockerfile")
COMMAND = re.compile(r"(?<!--type )(?<!=)\bhealchain(?= [a-z-]|$)[^`\n|#;()]*")


def python_files() -> list[Path]:
    return [path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if "node_modules" not in path.parts]


@cache
def sources() -> str:
    return "\n".join(path.read_text() for path in [*python_files(), *OTHER_SOURCES])


def in_code(text: str) -> list[str]:
    """What stands in fences, a command a line (with prompts, those lines alone), and between backticks."""
    fenced = []
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S):
        lines = block.splitlines()
        fenced += [line for line in lines if line.startswith("$ ")] or lines
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return [*fenced, *re.findall(r"`([^`]+)`", prose)]


def commands(path: Path) -> list[str]:
    """Every `healchain ...` with a subcommand."""
    found = []
    for code in in_code(path.read_text()):
        for one in COMMAND.findall(code):
            words = one.split()
            if len(words) > 1 and words[1].isascii():
                found.append(one.strip())
    return found


def unknown(command: str) -> str:
    """The first word of a command line that the program does not know, or an empty string."""
    words = shlex.split(command.replace("...", "").replace("[", "").replace("]", ""))[1:]
    at: Any = typer.main.get_command(cli.app)
    while hasattr(at, "commands") and words and not words[0].startswith("-"):
        name = words.pop(0)
        if name not in at.commands:
            return name
        at = at.commands[name]
    options = {flag for one in at.params for flag in (*one.opts, *one.secondary_opts)} | {"--help"}
    return next((word for word in words if word.startswith("-") and word.partition("=")[0] not in options), "")


@pytest.mark.parametrize("path", [OPERATE, README], ids=lambda path: path.name)
def test_every_command_and_option_exists(path: Path) -> None:
    found = commands(path)
    assert len(found) > 5
    assert [(command, word) for command in found if (word := unknown(command))] == []


def test_an_unknown_command_or_option_is_found() -> None:
    assert unknown("healchain stack upp") == "upp"
    assert unknown("healchain submit TASK.toml --detached") == "--detached"


def test_the_options_of_the_ports_are_those_of_the_stack() -> None:
    text = OPERATE.read_text()
    assert [part for part in stack_plan.DEFAULT_PORTS if f"`--{part}-port`" not in text] == []


def environment_names(text: str) -> set[str]:
    return set(re.findall(r"\b(?:PREFECT|HEALCHAIN|CHAIN|STORE|POSTGRES|MINIO)_[A-Z_]*[A-Z]\b", text))


def known_to_prefect() -> set[str]:
    """Every environment name that a setting of Prefect has, old spellings included."""
    found: set[str] = set()
    models = [Settings]
    while models:
        model = models.pop()
        prefix = str(model.model_config.get("env_prefix", ""))
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                models.append(field.annotation)
            choices = getattr(field.validation_alias, "choices", [])
            found |= {f"{prefix}{name}".upper(), *(str(choice).upper() for choice in choices)}
    return found


def test_every_environment_name_exists() -> None:
    names = environment_names(OPERATE.read_text() + README.read_text())
    prefect = known_to_prefect()
    assert "PREFECT_API_URL" in prefect
    assert "PREFECT_API_URI" not in prefect
    assert [name for name in names if name not in prefect and not re.search(rf"\b{name}\b", sources())] == []


def test_every_setting_of_the_gateway_is_told() -> None:
    from infra.gateway import SETTINGS

    assert [name for name in SETTINGS if f"`{name}`" not in OPERATE.read_text()] == []


def test_every_file_of_a_home_and_of_the_stack_exists() -> None:
    """Of HOME/a/b and FOLDER/a/b, each of the names; NAME stands for any."""
    paths = re.findall(r"`(?:HOME|FOLDER)/([\w./-]+)", OPERATE.read_text())
    assert len(set(paths)) > 10
    parts = {part.replace("NAME", "{").split("{")[0] for path in paths for part in path.split("/")}
    assert [part for part in parts if part and part not in sources()] == []


def test_every_link_leads_somewhere() -> None:
    for path in (OPERATE, README):
        for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), (path.name, target)


def test_every_section_that_is_linked_exists() -> None:
    text = OPERATE.read_text()
    titles = re.findall(r"^## (.+)", text, re.M)
    anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) == anchors


def test_every_test_that_is_named_exists() -> None:
    names = set(re.findall(r"\b(test_\w+)`", OPERATE.read_text()))
    text = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(names) > 4
    assert [name for name in names if f"def {name}(" not in text] == []


@cache
def strings() -> list[str]:
    """Every string of the code but docstrings, with … for what is filled in."""
    found = []
    for path in python_files():
        tree = ast.parse(path.read_text())
        inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr):
                inner.add(id(node.value))  # a docstring
            if id(node) in inner:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [" ".join(one.replace("`", "").split()) for one in found]


def messages() -> list[str]:
    section = OPERATE.read_text().partition("\n## 10. Messages")[2]
    return [row for row in re.findall(r"^\| `(.+?)` \|", section, re.M) if row != "message"]


def is_raised(message: str) -> bool:
    pieces = [re.escape(piece.strip()) for piece in message.split("…")]
    pattern = re.compile(".*".join(pieces), re.S)
    return any(pattern.search(one) for one in strings())


def test_every_message_is_one_of_the_code() -> None:
    found = messages()
    assert len(found) > 40
    assert [message for message in found if not is_raised(message)] == []


def test_a_message_that_nobody_raises_is_found() -> None:
    assert is_raised("--folder …: there is no stack")
    assert not is_raised("--folder …: there is no stock")
