"""The pages of the site that are made from the code, for mkdocs (`hooks:` in mkdocs.yml).

`pages()` returns them by name: recipes from their docstrings, settings from their dataclasses (the source of
`--help-all`), the public Python names, and every text of an error or a warning in the source. Nothing here imports
torch.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import pecobook
from pecobook.commands.table import COMMANDS
from pecobook.help import default_of, explanations
from pecobook.recipes import DEFAULT_RECIPE, RECIPES, claim, recipe, story, tokenize
from pecobook.settings.values import field_name, flags, is_switch

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "pecobook"
# Files outside docs/ that are pages of the site, and the names of these pages.
BESIDE = {"benchmarks/README.md": "benchmarks.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to those of docs/; mkdocs calls this."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links to files beside docs/ lead to their pages; mkdocs calls this for each page."""
    up = "../" * page.file.src_uri.count("/")
    for file, name in BESIDE.items():
        markdown = markdown.replace(f"](../{up}{file}", f"]({up}{name}")
    return markdown


def pages() -> dict[str, str]:
    """Return the text of every generated page by its name under docs/."""
    return {
        "reference/recipes.md": recipes_page(),
        **{f"reference/{command}.md": settings_page(command) for command in COMMANDS},
        "reference/settings.md": commands_page(),
        "reference/api.md": api_page(),
        "reference/messages.md": messages_page(),
        **{f"notebooks/{file.stem}.md": notebook_page(file) for file in sorted(ROOT.glob("docs/notebooks/*.ipynb"))},
        **{name: beside_page(file) for file, name in BESIDE.items()},
    }


def beside_page(file: str) -> str:
    """Return a file beside docs/ with its links turned to the pages of the site."""
    text = (ROOT / file).read_text()
    for other, name in BESIDE.items():
        text = text.replace(f"]({other}", f"]({name}")
    return re.sub(r"\]\((?:\.\./)?docs/", "](", text)


# ------------------------------------------------------------------------------------------------------------- recipes


def recipes_page() -> str:
    """Return all recipes: a table for each command, and each recipe's source, command, cost and result."""
    text = [
        "# Recipes",
        "A recipe is a complete set of settings with a name: `pecobook codebook cifar10 ...`. Without a name a command "
        f"takes `{DEFAULT_RECIPE}`. Flags change single settings of it. `tiny` takes about a minute on two cores and "
        "runs the code of the others.",
        "This page is made from the recipes themselves. Costs are counted, measured or estimated, as each one says.",
    ]
    for command in RECIPES:
        text += [f"## {command}", "| recipe | pixels | images a step | length | cost |\n|---|---|---|---|---|"]
        for name in RECIPES[command]:
            config = recipe(command, name)
            length = f"{int(config.max_steps):,} steps" if config.max_steps.isdigit() else config.max_steps
            numbers = f"{config.image_size} | {config.batch_size:,} | {length}"
            text[-1] += f"\n| [{name}](#{command}-{name}) | {numbers} | {_cost(story(command, name))} |"
        for name in RECIPES[command]:
            first = claim(command, name)
            text.append(f"### {command} {name} {{ #{command}-{name} }}")
            text.append(_story(story(command, name)) if not first.startswith("Another name") else first)
    return "\n\n".join(text) + "\n"


# The first words of a part of a recipe's docstring: "Cost: ", "Result of MAE: ".
_HEAD = re.compile(r"(?:Source|Command|Cost|Result)(?: of [^:]{1,60})?: ")


def _cost(text: str) -> str:
    """Return operations and time of a recipe in a few words, from its docstring; empty where it tells none."""
    cost = " ".join(text.partition("Cost: ")[2].partition("Result")[0].split())
    operations = re.search(r"[\d.,]+ [GT]FLOP(?= for an image)", cost)
    time = re.search(r"(?:[Aa]bout|so) ([\d.]+ hours|[\d.]+ minutes) (?:of one (\w+)|there)", cost)
    words = [f"{operations[0]} an image"] if operations else []
    return "; ".join([*words, *([f"{time[1]} on {f'one {time[2]}' if time[2] else '2 CPU cores'}"] if time else [])])


def _story(text: str) -> str:
    """Return the docstring of a recipe as Markdown: its commands as code, its other parts under their names."""
    parts: list[str] = []
    for line in text.splitlines():
        if _HEAD.match(line) or not parts or (parts[-1] and not line.strip()):
            parts.append(line.strip())
        else:
            parts[-1] = f"{parts[-1]} {line.strip()}".strip()
    formatted = []
    for part in filter(None, parts):
        head, _, rest = part.partition(": ")
        if head == "Command":
            formatted.append(f"```text\n{rest}\n```")
        else:
            part, rest = (text.replace("docs/results.md", "[results](../results.md)") for text in (part, rest))
            formatted.append(f"**{head}:** {_escaped(rest)}" if _HEAD.match(part) else _escaped(part))
    return "\n\n".join(formatted)


def _escaped(text: str) -> str:
    """Return plain text in which no character outside of code has a meaning in Markdown or HTML."""
    pieces = re.split(r"(`[^`]*`|\[results\]\([^)]*\))", text)
    plain = (re.sub(r"([*_<>\[\]|])", r"\\\1", piece) for piece in pieces[::2])
    kept = [*pieces[1::2], ""]
    return "".join(piece + code for piece, code in zip(plain, kept, strict=True))


# ------------------------------------------------------------------------------------------------------------ settings


def commands_page() -> str:
    """Return the list of the commands, each with a link to its settings."""
    rows = [f"| [`pecobook {name}`]({name}.md) | {_escaped(content.summary)} |" for name, content in COMMANDS.items()]
    table = "\n".join(["| command | what it does |", "|---|---|", *rows])
    return (
        "# Commands and settings\n\nEvery command with all of its flags, made from the settings themselves: the text "
        "of `pecobook COMMAND --help-all`. In Python a flag is a keyword with underscores, and a group such as "
        f"`--optim.lr` is a dictionary, `optim={{'lr': 1e-3}}`.\n\n{table}\n"
    )


def settings_page(command: str) -> str:
    """Return usage, examples and every flag of a command."""
    content = COMMANDS[command]
    config = _settings(command)
    defaults = f" in recipe `{DEFAULT_RECIPE}`" if command in RECIPES or command == "tokenize" else ""
    examples = "\n".join(f"pecobook {example}" for example in content.examples)
    text = [
        f"# pecobook {command}",
        _escaped(inspect.getdoc(content.settings) or ""),
        f"```text\npecobook {command} {content.usage} [--flag value ...]\n```",
        f"Examples:\n\n```text\n{examples}\n```",
        f"Every flag; its default{defaults} stands in parentheses at the end.",
    ]
    types, texts, group = flags(content.settings), explanations(content.settings), ""
    for name, kind in sorted(types.items(), key=lambda pair: pair[0].count(".")):
        head = name.rpartition(".")[0]
        if head != group:
            group = head
            described = inspect.getdoc(type(attrgetter(field_name(group))(config))) or ""
            text += [f"## --{group}", _escaped(described)]
        default = default_of(attrgetter(field_name(name))(config), kind)
        switch = f", `--{head}{'.' if head else ''}no-{name.rpartition('.')[2]}`" if is_switch(kind) else ""
        text.append(f"#### `--{name}`{switch} {{ #{name} }}")
        text.append(_escaped(texts[name] + default))
    return "\n\n".join(text) + "\n"


def _settings(command: str) -> Any:
    if command in RECIPES:
        return recipe(command)
    return tokenize() if command == "tokenize" else COMMANDS[command].settings()


# ----------------------------------------------------------------------------------------------------------------- API


# What users call of the classes; their other methods serve pecobook's own commands.
_MEMBERS = (
    *("from_pretrained", "save_pretrained", "push_to_hub", "export_onnx", "encode", "decode", "codebook"),
    *("forward", "predict", "per_layer", "update"),
)


def api_page() -> str:
    """Return the public names: classes and functions of tensors first, then the commands as functions."""
    names = [name for name in pecobook.__all__ if name not in COMMANDS]
    text = [
        "# Python",
        "All public names, by their docstrings: `from pecobook import NAME`. The guide [Python](../python.md) has "
        "examples.",
    ]
    members = f"\n    options:\n      inherited_members: true\n      members: [{', '.join(_MEMBERS)}]"
    text += [f"::: {pecobook._home(name)}.{name}{members}" for name in sorted(names, key=str.lower)]
    text += [
        "## The commands as functions",
        "Each command is a function of the same name whose keywords are the flags of the [command](settings.md).",
    ]
    text += [f"::: {pecobook._home(name)}.{name}" for name in pecobook.__all__ if name in COMMANDS]
    return "\n\n".join(text) + "\n"


# ------------------------------------------------------------------------------------------------------------ messages

# Functions and classes whose first text is shown to the user, and the few whose second text is.
_RAISE = re.compile(r"^(ConfigError|DataError|WeightsError|RunFolderError|NonFiniteLossError|PecobookError|say)$")
_WARNING = "Warning: "
_SECOND = ("refuse", "BadImage")
_AREAS = {
    "settings": "Flags and settings",
    "cli.py": "Flags and settings",
    "data": "Images, labels, masks and objects",
    "models": "Weights and networks",
    "engine": "Runs: folders, devices, memory, resuming",
    "stages": "Training",
    "commands": "Commands beside training",
    "analysis": "Commands beside training",
    "utils": "Files, devices and processes",
}


def messages() -> dict[str, list[str]]:
    """Return every text of an error or note in the source, by area, with "…" for the parts that vary."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for file, tree in _trees().items():
        area = _AREAS.get(file.relative_to(SOURCE).parts[0], "Commands beside training")
        for text in _texts(tree):
            found[area][text] = None
    return {area: sorted(texts, key=str.lower) for area, texts in found.items()}


def all_texts() -> list[str]:
    """Return every text in the source, whether or not it is a message of its own, with "…" for the parts that vary."""
    return [_shown(node) for tree in _trees().values() for node in ast.walk(tree) if _is_text(node)]


@functools.cache
def _trees() -> dict[Path, ast.AST]:
    """Return the syntax tree of every file of the source."""
    return {file: ast.parse(file.read_text()) for file in sorted(SOURCE.rglob("*.py"))}


def _texts(tree: ast.AST) -> Iterator[str]:
    inner = {piece for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for piece in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            second = node.func.id in _SECOND and len(node.args) > 1
            if node.args and (second or _RAISE.match(node.func.id)):
                text = _shown(node.args[1 if second else 0])
                if len(re.sub(r"[^a-z]", "", text)) > 16 or " " in text.strip("…. "):  # else it is no sentence
                    yield f"--FLAG {text}" if node.func.id == "refuse" else text
        elif (
            isinstance(node, (ast.Constant, ast.JoinedStr)) and node not in inner and _shown(node).startswith(_WARNING)
        ):
            yield _shown(node)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _shown(node: ast.AST) -> str:
    """Return the text of an expression, with "…" for all that is not a literal."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"\s*\n\s*", " ", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_shown(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _shown(node.left) + _shown(node.right)
    return "…"


def messages_page() -> str:
    """Return all messages by area."""
    text = [
        "# All messages",
        "Every error, refusal and note of the source, as it is printed; … stands for what varies, such as the name of "
        "a file. Each says what is wrong, which value, and what to do. Paste words of it into the search at the top. "
        "[Troubleshooting](../troubleshooting.md) explains the commonest at length.",
    ]
    for area, texts in sorted(messages().items()):
        text += [f"## {area}", "\n".join(f"- {_escaped(message)}" for message in texts)]
    return "\n\n".join(text) + "\n"


# ----------------------------------------------------------------------------------------------------------- notebooks


def notebook_page(file: Path) -> str:
    """Return a notebook as a page: its text, and its code in blocks."""
    link = f"[Download the notebook]({file.name}) and open it in Jupyter. The tests run it from beginning to end."
    text = []
    for cell in json.loads(file.read_text())["cells"]:
        source = "".join(cell["source"])
        text.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join([text[0], link, *text[1:]]) + "\n"
