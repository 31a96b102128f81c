"""`pecobook completion SHELL`: a script for bash, zsh or fish that completes commands, recipes, flags and choices.

The script contains all names of this version, from the settings, so that pressing Tab does not start Python.
"""

from __future__ import annotations

import textwrap
import typing
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from pecobook.commands.paper_tables import TABLES
from pecobook.commands.table import COMMANDS
from pecobook.errors import ConfigError, did_you_mean
from pecobook.help import explanations, first_sentence
from pecobook.recipes import RECIPES, claim
from pecobook.settings.values import flags, is_switch

SHELLS = ("bash", "zsh", "fish")
# Values of a flag that takes several of them, or that may also be given without a value.
_CHOICES = {"loggers": ("auto", "tensorboard", "wandb", "mlflow"), "resume": ("auto",)}


class Flag(NamedTuple):
    """A flag in a completion script."""

    explanation: str
    choices: tuple[str, ...] = ()
    """Values that the flag takes; empty if any text, number or file may follow."""
    takes_value: bool = True


class Names(NamedTuple):
    """Words that are not flags, by position on the command line: 2 is the first position after the command."""

    position: int
    explanations: Mapping[str, str]
    repeats: bool = False
    """Whether all further positions take these words too."""
    after: str = ""
    """The word that must come directly before; empty allows every word."""


def script(shell: str, commands: Mapping[str, str]) -> str:
    """Return the script for `shell`.

    Args:
        shell: bash, zsh or fish; ConfigError for another shell.
        commands: every command of pecobook with a description.
    """
    if shell not in SHELLS:
        raise ConfigError(f"Completion is written for {', '.join(SHELLS)}, not '{shell}'.{did_you_mean(shell, SHELLS)}")
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](commands)


def flags_of(command: str) -> dict[str, Flag]:
    """Return every flag of a command by its name with dashes."""
    if command not in COMMANDS:
        return {}
    config_type = COMMANDS[command].settings
    texts = explanations(config_type)
    by_name: dict[str, Flag] = {}
    for name, kind in flags(config_type).items():
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else _CHOICES.get(name, ())
        text = first_sentence(texts[name])
        by_name[f"--{name}"] = Flag(text, tuple(map(str, choices)), takes_value=kind is not bool)
        if is_switch(kind):
            group, dot, leaf = name.rpartition(".")
            by_name[f"--{group}{dot}no-{leaf}"] = Flag(f"Turn --{name} off.", takes_value=False)
    by_name["--config"] = Flag("Read settings from the config.json of a run.")
    by_name["--help"] = Flag("Show usage, recipes, examples and the flags that people use.", takes_value=False)
    by_name["--help-all"] = Flag("Explain every flag.", takes_value=False)
    return by_name


def names_of(command: str) -> list[Names]:
    """Return the words that may follow a command without a flag."""
    if command in (*RECIPES, "tokenize", "bench"):
        kind = command if command in RECIPES else "pretrain"
        recipes = {name: claim(kind, name) for name in RECIPES[kind]}
        if command == "bench":
            return [Names(2, {"pretrain": "measure pre-training"}), Names(3, recipes)]
        return [Names(2, recipes)]
    if command == "check":
        summaries = {name: COMMANDS[name].summary for name in RECIPES}
        return [Names(2, summaries), *_recipes_by_command()]
    if command == "reproduce":
        return [Names(2, {name: table.title for name, table in TABLES.items()}, repeats=True)]
    if command == "recipes":
        names = {name: "a recipe" for recipes in RECIPES.values() for name in recipes}
        return [Names(2, {kind: f"recipes of {kind}" for kind in RECIPES} | names), *_recipes_by_command()]
    if command == "completion":
        return [Names(2, dict.fromkeys(SHELLS, "a shell"))]
    return []


def _recipes_by_command() -> list[Names]:
    """Return the recipes of each command, which follow its name."""
    return [Names(3, {name: claim(kind, name) for name in recipes}, after=kind) for kind, recipes in RECIPES.items()]


def _short(text: str) -> str:
    return textwrap.shorten(text, 80, placeholder=" ...")


# ---------------------------------------------------------------------------------------------------------------- bash

_BASH = """# Completion of pecobook for bash. In ~/.bashrc: eval "$(pecobook completion bash)"
_pecobook() {
    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD - 1]}" place=$COMP_CWORD
    local flags="--help --version" names="" choices=""
    if [[ $word == "=" ]]; then  # to bash, --flag=value is three words
        word=""
    elif [[ $before == "=" ]]; then
        before="${COMP_WORDS[COMP_CWORD - 2]}"
    fi
    if [[ $place -eq 1 ]]; then
        names="@commands@"
    else
        flags="--help"
        case "${COMP_WORDS[1]}" in
@cases@
        esac
    fi
    if [[ $word == -* ]]; then
        names=$flags
    elif [[ -n $choices ]]; then
        names=$choices
    elif [[ $before == -* ]]; then
        names=""  # a file, or anything else
    fi
    COMPREPLY=($(compgen -W "$names" -- "$word"))
}
complete -o default -F _pecobook pecobook
"""


def _bash(commands: Mapping[str, str]) -> str:
    return _fill(_BASH, commands, '"{}"', " ".join)


def _fill(template: str, commands: Mapping[str, str], words: str, listed: Callable[[Mapping[str, str]], str]) -> str:
    """Return the bash or zsh template with a branch for each command.

    Args:
        template: the script, with `@cases@` and `@commands@`.
        commands: the commands with their descriptions.
        words: how the shell writes a list, with {} for its words.
        listed: returns the words of a list, given their explanations by word.
    """
    branches: list[str] = []
    for command in commands:
        command_flags, lines = flags_of(command), list[str]()
        if command_flags:
            explained = {name: flag.explanation for name, flag in command_flags.items()}
            lines.append(f"flags={words.format(listed(explained))}")
        for names in names_of(command):
            test = f"$place {'-ge' if names.repeats else '-eq'} {names.position}"
            test += f" && $before == {names.after}" if names.after else ""
            lines.append(f"[[ {test} ]] && names={words.format(listed(names.explanations))}")
        choices = [
            f"    {name}) choices={words.format(' '.join(flag.choices))} ;;"
            for name, flag in command_flags.items()
            if flag.choices
        ]
        lines += ['case "$before" in', *choices, "esac"] if choices else []
        branches += [f"{command})", *(f"    {line}" for line in lines), "    ;;"]
    cases = textwrap.indent("\n".join(branches), " " * 12)
    return template.replace("@cases@", cases).replace("@commands@", listed(commands))


# ----------------------------------------------------------------------------------------------------------------- zsh

_ZSH = """#compdef pecobook
# Completion of pecobook for zsh. In ~/.zshrc, after compinit: eval "$(pecobook completion zsh)"
_pecobook() {
    local before="${words[CURRENT - 1]}"
    local -i place=$((CURRENT - 1))
    local -a flags names choices
    if [[ $PREFIX == --*=* ]]; then
        before="${PREFIX%%=*}"
        compset -P '*='
    fi
    flags=(--help --version)
    if ((place == 1)); then
        names=(@commands@)
    else
        flags=(--help)
        case "${words[2]}" in
@cases@
        esac
    fi
    if [[ $PREFIX == -* ]]; then
        _describe -o flag flags
    elif (($#choices)); then
        compadd -a choices
    elif (($#names)) && [[ $before != -* ]]; then
        _describe word names
    else
        _files
    fi
}
if [[ "${funcstack[1]}" == _pecobook ]]; then
    _pecobook "$@"  # a file of $fpath
else
    compdef _pecobook pecobook
fi
"""


def _zsh(commands: Mapping[str, str]) -> str:
    def described(texts: Mapping[str, str]) -> str:
        pairs = (f"{name}:{_short(text)}" for name, text in texts.items())
        return " ".join("'" + pair.replace("'", "'\\''") + "'" for pair in pairs)

    return _fill(_ZSH, commands, "({})", described)


# ---------------------------------------------------------------------------------------------------------------- fish

_FISH = """# Completion of pecobook for fish: pecobook completion fish > ~/.config/fish/completions/pecobook.fish
function __pecobook_after  # COMMAND [TEST POSITION]: whether COMMAND was typed and the cursor is at POSITION
    set -l typed (commandline -opc)
    test (count $typed) -ge 2; and test "$typed[2]" = "$argv[1]"; or return 1
    test (count $argv) -eq 1; and return 0
    test (count $typed) $argv[2] $argv[3]; and not string match -q -- '-*' $typed[-1]
end
complete -c pecobook -n 'test (count (commandline -opc)) -eq 1' -l help -d 'Show what pecobook can do.'
complete -c pecobook -n 'test (count (commandline -opc)) -eq 1' -l version -d 'Show the version.'
"""


def _fish(commands: Mapping[str, str]) -> str:
    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    def lines_of(test: str, texts: Mapping[str, str]) -> list[str]:
        return [
            f"complete -c pecobook -n {quoted(test)} -f -a {name} -d {quoted(_short(text))}"
            for name, text in texts.items()
        ]

    lines = lines_of("test (count (commandline -opc)) -eq 1", commands)
    for command in commands:
        for names in names_of(command):
            position = f"{'-ge' if names.repeats else '-eq'} {names.position}"
            word = f"; and test (commandline -opc)[-1] = {names.after}" if names.after else ""
            lines += lines_of(f"__pecobook_after {command} {position}{word}", names.explanations)
        for name, flag in flags_of(command).items():
            value = f" -x -a {quoted(' '.join(flag.choices))}" if flag.choices else " -r" * flag.takes_value
            test = quoted(f"__pecobook_after {command}")
            lines.append(f"complete -c pecobook -n {test} -l {name[2:]}{value} -d {quoted(_short(flag.explanation))}")
    return _FISH + "\n".join(lines) + "\n"
