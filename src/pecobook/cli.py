"""The command line: one short function a command. Nothing heavy is imported before a command needs it.

Flags, Python keywords and config.json take one way to a setting (`pecobook.settings.values.replace`), so they know the
same names and give the same errors; tyro draws the help of each command from the settings' own explanations.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import textwrap
from typing import Any

from pecobook import recipes
from pecobook.commands import table
from pecobook.errors import ConfigError, PecobookError, did_you_mean
from pecobook.recipes import RECIPES
from pecobook.settings.values import flags, load, replace

COMMANDS = {name: command.summary for name, command in table.COMMANDS.items()} | {
    "recipes": "list the recipes and what each claims",
    "completion": "a script with which bash, zsh or fish completes commands, recipes and flags",
}


def main(argv: list[str] | None = None) -> None:
    """Run a command. Exits with 2 after a user's mistake, without a traceback."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            _dispatch(args)
        except SystemExit:  # after a help page
            sys.stdout.flush()  # here, since an error in Python's own flush at the end cannot be caught
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_left():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except PecobookError as error:
        if os.environ.get("PECOBOOK_TRACEBACK"):
            raise
        _tell(error)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"pecobook: the disk is full ({error.filename or error}).", file=sys.stderr)
        resumes = bool(args) and args[0] in (*RECIPES, "tokenize")
        print(
            f"What was finished is whole. Make room, then {'go on with --resume' if resumes else 'start again'}.",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("pecobook: interrupted.", file=sys.stderr)
        sys.exit(130)


def _reader_left() -> bool:
    """Whether nobody reads what is printed any more, as after `pecobook recipes | head -1`."""
    try:
        print(flush=True)
    except BrokenPipeError:
        return True
    return False


def _tell(error: PecobookError) -> None:
    """Print what went wrong: once where all ranks find the same, with the rank where one of them alone met it."""
    distributed = sys.modules.get("torch.distributed")  # importing it takes long, and a run has done so
    together = distributed is not None and distributed.is_available() and distributed.is_initialized()
    rank = distributed.get_rank() if distributed is not None and together else int(os.environ.get("RANK", "0"))
    if rank == 0:
        print(f"pecobook: {error}", file=sys.stderr)
    elif together and not error.on_all_ranks:
        print(f"pecobook: rank {rank}: {error}", file=sys.stderr)


def _dispatch(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_help())
        return
    if args[0] == "--version":
        from importlib.metadata import version

        print(f"pecobook {version('pecobook')}")
        return
    command, rest = args[0], args[1:]
    if command not in COMMANDS:
        raise ConfigError(f"Unknown command '{command}'.{did_you_mean(command, COMMANDS)} See pecobook --help.")
    if command == "recipes":
        _recipes(rest)
    elif command == "completion":
        _completion(rest)
    elif command in RECIPES:
        config = _settings(command, rest)
        from pecobook.api import run

        run(command, config)
    else:
        config = _settings(command, rest)
        getattr(importlib.import_module(f"pecobook.commands.{command}"), command)(config)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return (
        "pecobook: perceptual codebooks for BERT pre-training of vision transformers (PeCo, arXiv 2111.12710)\n\n"
        "  pecobook demo                                            see everything, in minutes\n"
        "  pecobook COMMAND [RECIPE] --data SOURCE --out RUN [--flag value ...]\n"
        "  pecobook COMMAND --help                                  usage, recipes, examples, the flags people use\n"
        "  pecobook COMMAND --help-all                              all flags, explained\n\n"
        + "\n".join(lines)
        + "\n\nSOURCE: a folder of images, a parquet file or folder, tar shards, hf:owner/name, or photos (built in)."
    )


# ------------------------------------------------------------------------------------------------------------ commands


def _recipes(args: list[str]) -> None:
    from pecobook.recipes import claims, story

    if args and args[0] in ("-h", "--help", "--help-all"):
        print(_RECIPES_HELP)
        return
    chosen = [(command, name, claim) for command, name, claim in claims() if set(args) <= {command, name}]
    if not chosen:
        known = [*RECIPES, *(name for recipes in RECIPES.values() for name in recipes)]
        told = did_you_mean(args[-1], known)
        raise ConfigError(f"There is no recipe '{' '.join(args)}'.{told} 'pecobook recipes' lists them.")
    if not args or set(args) <= set(RECIPES):
        for command, name, claim in chosen:
            print(f"{command + ' ' + name:<26} {claim}")
        return
    for command, name, _ in chosen:
        print(f"{command} {name}\n\n{textwrap.indent(story(command, name), '    ')}\n")


_RECIPES_HELP = """usage: pecobook recipes [COMMAND] [NAME]

List the recipes and what each claims; with a NAME tell all of it: source, command, cost, result.

examples
  pecobook recipes codebook
  pecobook recipes codebook paper"""


def _completion(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help", "--help-all"):
        print(_COMPLETION_HELP)
        return
    if len(args) > 1:
        raise ConfigError(f"'completion' takes one shell, not {len(args)} words. See pecobook completion --help.")
    from pecobook.completion import script

    print(script(args[0], COMMANDS), end="")


_COMPLETION_HELP = """usage: pecobook completion bash|zsh|fish

Print a script with which the shell completes commands, recipes, flags and the values they choose from.

examples
  eval "$(pecobook completion bash)"                                          in ~/.bashrc
  eval "$(pecobook completion zsh)"                                           in ~/.zshrc, after compinit
  pecobook completion fish > ~/.config/fish/completions/pecobook.fish         once"""


# ------------------------------------------------------------------------------------------------------------- parsing


def _settings(command: str, args: list[str]) -> Any:
    """The settings that the words and flags after a command give. Raises ConfigError."""
    count = next((place for place, word in enumerate(args) if word.startswith("-")), len(args))
    words, args = args[:count], args[count:]
    if command in (*RECIPES, "tokenize"):
        recipe = words.pop(0) if words else recipes.DEFAULT_RECIPE
        config = recipes.tokenize(recipe) if command == "tokenize" else recipes.recipe(command, recipe)
        return parse(config, [*words, *args], f"{command} {recipe}")
    if command == "bench":
        if not {*words[:1], *args[:1]} & {"pretrain", "-h", "--help", "--help-all"}:
            raise ConfigError("'bench' measures pretrain: pecobook bench pretrain [RECIPE] [--flag value ...]")
        command, words = "bench pretrain", words[1:]
    config_type = table.COMMANDS[command.split()[0]].settings
    named: list[str] = []
    for name in table.COMMANDS[command.split()[0]].words:
        count = len(words) if str(flags(config_type)[name]).startswith("tuple") else 1
        named += [f"--{name}", *words[:count]] if words else []
        words = words[count:]
    return parse(config_type(), [*named, *words, *args], command)


def parse(config: Any, args: list[str], prog: str) -> Any:
    """Settings `config` with the values that the flags in `args` give. Raises ConfigError."""
    if "--help-all" in args:
        _explain(config, prog)
    if "-h" in args or "--help" in args:
        from pecobook.help import page

        command, _, recipe = prog.partition(" ")
        print(page(command, config, recipe if command in (*RECIPES, "tokenize") else ""))
        sys.exit(0)
    values = read_flags(args, {**flags(type(config)), "config": str}, prog.split()[0])
    if "config" in values:
        config = load(config, values.pop("config"))
    return replace(config, values)


def read_flags(args: list[str], known: dict[str, Any], command: str) -> dict[str, Any]:
    """`--name value`, `--name=value`, `--switch` and `--no-switch` to {dotted field: text, list of texts or bool}."""
    values: dict[str, Any] = {}
    position = 0
    while position < len(args):
        token = args[position]
        position += 1
        if not token.startswith("--"):
            raise ConfigError(f"'{token}' stands alone: flags are written --name value. See pecobook {command} --help.")
        name, equals, text = token[2:].partition("=")
        name = name.replace("_", "-")
        head, _, leaf = name.rpartition(".")
        positive = f"{head}.{leaf.removeprefix('no-')}".lstrip(".") if leaf.startswith("no-") else ""
        if known.get(positive) is bool:
            values[_field(positive)] = False
            continue
        if name not in known:
            raise ConfigError(f"Unknown flag '--{name}'.{_suggest(name, known)} See pecobook {command} --help.")
        found = [text] if equals else []
        while not equals and position < len(args) and not args[position].startswith("--"):
            found.append(args[position])
            position += 1
        values[_field(name)] = _value(name, found, known[name], explicit=bool(equals))
    return values


def _value(name: str, found: list[str], kind: Any, *, explicit: bool) -> Any:
    if str(kind).startswith("tuple"):
        return tuple(found[0].split(",")) if len(found) == 1 and "," in found[0] else tuple(found)
    if kind is bool and not found and not explicit:
        return True
    if not found:
        raise ConfigError(f"--{name} needs a value.")
    if len(found) > 1:
        raise ConfigError(f"--{name} takes one value, not {len(found)} ({' '.join(found)}): quote a value with spaces.")
    return found[0]


def _field(name: str) -> str:
    return name.replace("-", "_")


def _suggest(name: str, known: dict[str, Any]) -> str:
    leaf = name.rpartition(".")[2]
    nested = [option for option in known if option.rpartition(".")[2] == leaf]
    if nested:  # --lr is --optim.lr
        return f" Did you mean '--{nested[0]}'?"
    return did_you_mean(f"--{name}", [f"--{option}" for option in known])


def _explain(config: Any, prog: str) -> None:
    import tyro

    try:
        tyro.cli(type(config), default=config, args=["--help"], prog=f"pecobook {prog}")
    except SystemExit:
        print("--config FILE: read settings from the config.json of a run; flags change single ones.")
        raise


if __name__ == "__main__":
    main()
