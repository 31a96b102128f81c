"""The command line. A command imports torch and other large libraries only after its flags have been checked.

`commands.table` lists the commands. Flags, Python keywords and config.json all set values through
`pecobook.settings.values.replace`, so they have the same names and errors; `help` writes the help pages from the
settings' docstrings.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
import textwrap
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from pecobook import recipes
from pecobook.commands import table
from pecobook.engine.signals import from_the_start
from pecobook.engine.world import printing_rank
from pecobook.errors import ConfigError, PecobookError, did_you_mean, first_line, printable
from pecobook.recipes import RECIPES
from pecobook.settings.check import CheckConfig, of_run
from pecobook.settings.config_files import read_config
from pecobook.settings.values import field_name, flag, flags, is_switch, load, replace
from pecobook.utils.parent import end_with_parent
from pecobook.utils.printer import doing, show

COMMANDS = {name: command.summary for name, command in table.COMMANDS.items()} | {
    "recipes": "list the recipes and the claim of each",
    "completion": "print a script with which bash, zsh or fish completes commands, recipes and flags",
}


def main(argv: list[str] | None = None) -> None:
    """Run a command. Exits with code 2 after a user error, without a traceback."""
    args = list(sys.argv[1:] if argv is None else argv)
    if sys.platform == "win32":
        sys.exit("pecobook: Windows is not supported: use Linux within Windows (WSL), where GPUs work too.")
    end_with_parent()
    _hide_warnings()
    try:
        try:
            dispatch(args)
        except SystemExit:  # after a help page
            sys.stdout.flush()  # now, since an error in Python's own flush at exit cannot be caught
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except PecobookError as error:
        if os.environ.get("PECOBOOK_TRACEBACK"):
            raise
        _print_error(error)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in _REMEDIES or os.environ.get("PECOBOOK_TRACEBACK"):
            raise
        _print_os_error(error, resumes=bool(args) and args[0] in (*RECIPES, "tokenize"))
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if "home directory" in str(error):  # Python's message on a path such as ~nobody/images names no path
            named = next((word for word in args if word.startswith("~")), "~")
            show(f"pecobook: '{named}': the system knows no home folder of that user: write the path in full.")
            sys.exit(2)
        of_memory = isinstance(error, MemoryError) or "alloc" in str(error)  # torch raises RuntimeError
        if not of_memory or os.environ.get("PECOBOOK_TRACEBACK"):
            raise
        show(f"pecobook: out of memory: {printable(first_line(error))}")
        show("Take fewer images at once, fewer pixels, fewer codewords or a smaller network.")
        sys.exit(2)
    except KeyboardInterrupt:
        show("pecobook: interrupted.")
        sys.exit(130)
    finally:
        doing("")


def _hide_warnings() -> None:
    """Hide library warnings, several lines each, that a user can do nothing about."""
    # timm's interpolation of relative position tables to another image size uses an API that PyTorch will remove.
    warnings.filterwarnings("ignore", module=r"timm\.layers\.interpolate")
    # A weights file written by another version of pickle is read anyway, or refused with an error.
    warnings.filterwarnings("ignore", message="Detected pickle protocol")


# What a user can do about an error of the operating system.
_MAKE_ROOM = "Finished files are complete. Make room, then {again}."
_REMEDIES = {
    errno.ENOSPC: _MAKE_ROOM,
    errno.EDQUOT: _MAKE_ROOM,
    errno.EROFS: "Finished files are complete. Name a folder that can be written.",
    errno.EACCES: "Allow this user to use it, or name another path; then {again}.",
    errno.EPERM: "Allow this user to use it, or name another path; then {again}.",
    errno.ENOENT: "It was deleted or moved while the command ran: restore it, or {again}.",
    errno.ENOTDIR: "A file stands where a folder was: name another path.",
    errno.EISDIR: "A folder stands where a file was: name another path.",
    errno.ENAMETOOLONG: "Name a shorter path.",
    errno.ELOOP: "Its links lead in a circle: name another path.",
    errno.EMFILE: "Allow more open files (ulimit -n), or take fewer --workers; then {again}.",
    errno.ENFILE: "The system has no more open files: end other programs, then {again}.",
    errno.EIO: "The disk failed: check it, then {again}.",
    errno.ESTALE: "The network file system lost it: check the mount, then {again}.",
    errno.EAGAIN: "The system allows no more processes (ulimit -u): take fewer --workers; then {again}.",
    errno.ENOMEM: "Free memory, or take fewer --workers; then {again}.",
}


def _print_os_error(error: OSError, *, resumes: bool) -> None:
    """Print an operating system error as a sentence with the path and the remedy."""
    reason = (error.strerror or str(error)).rstrip(".")
    path = f"'{os.fsdecode(error.filename)}' cannot be used: " if error.filename else ""
    show(f"pecobook: {printable(path)}{reason[:1].lower()}{reason[1:]}.")
    again = "continue with --resume" if resumes else "start again"
    show(_REMEDIES[error.errno or 0].format(again=again))


def _stdout_is_closed() -> bool:
    """Return whether the reader of standard output has gone, as after `pecobook recipes | head -1`."""
    try:
        show("", stdout=True)
    except BrokenPipeError:
        return True
    return False


def _print_error(error: PecobookError) -> None:
    """Print an error: once if all ranks have it, with the rank's number if one rank alone may have it."""
    distributed = sys.modules.get("torch.distributed")  # not imported here: a distributed run has imported it already
    initialized = distributed is not None and distributed.is_available() and distributed.is_initialized()
    rank = distributed.get_rank() if distributed is not None and initialized else printing_rank()
    if rank == 0:
        show(f"pecobook: {error}")
    elif not error.on_all_ranks:
        show(f"pecobook: rank {rank}: {error}")


def dispatch(args: list[str]) -> None:
    """Run the command that `args` names, or print help or the version. Raises PecobookError."""
    if not args or args[0] in ("-h", "--help", "help"):
        show(_help(), stdout=True)
        return
    if args[0] == "--version":
        from importlib.metadata import version

        show(f"pecobook {version('pecobook')}", stdout=True)
        return
    command, rest = args[0], args[1:]
    if command in ("recipes", "completion"):
        (_recipes if command == "recipes" else _completion)(rest)
        return
    try:
        if command not in COMMANDS:
            raise ConfigError(f"Unknown command '{command}'.{did_you_mean(command, COMMANDS)} See pecobook --help.")
        config = _settings(command, rest)
    except ConfigError as error:  # all ranks have it
        error.on_all_ranks = True
        raise
    if "torch" not in sys.modules and printing_rank() == 0:
        doing("loading PyTorch", after=0)
    if command in RECIPES:
        with from_the_start(until_exit=True):
            from pecobook.api import run

            run(command, config, _recipe_name(rest))
    else:
        with from_the_start(until_exit=True) if command == "tokenize" else contextlib.nullcontext():
            result = getattr(importlib.import_module(f"pecobook.commands.{command}"), command)(config)
        if command == "check" and result["problems"]:
            sys.exit(1)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return (
        "pecobook: perceptual codebooks for BERT pre-training of vision transformers (PeCo, arXiv 2111.12710)\n\n"
        "  pecobook demo                                            run all stages, in minutes\n"
        "  pecobook COMMAND [RECIPE] --data SOURCE --out RUN [--flag value ...]\n"
        "  pecobook COMMAND --help                                  usage, recipes, examples, the flags people use\n"
        "  pecobook COMMAND --help-all                              all flags, explained\n\n"
        + "\n".join(lines)
        + "\n\nSOURCE: a folder of images, a parquet file or folder, tar shards, hf:owner/name, or photos (built in);\n"
        "parquet and shards also at s3://, gs://, https:// and hf://."
    )


# ------------------------------------------------------------------------------------------------------------ commands


def _recipes(args: list[str]) -> None:
    from pecobook.recipes import claims, story

    if args and args[0] in ("-h", "--help", "--help-all"):
        show(_RECIPES_HELP, stdout=True)
        return
    matches = [(command, name, claim) for command, name, claim in claims() if set(args) <= {command, name}]
    if not matches:
        names = [*RECIPES, *(name for recipes in RECIPES.values() for name in recipes)]
        suggestion = did_you_mean(args[-1], names)
        raise ConfigError(f"There is no recipe '{' '.join(args)}'.{suggestion} 'pecobook recipes' lists them.")
    if not args or set(args) <= set(RECIPES):
        for command, name, claim in matches:
            show(f"{command + ' ' + name:<26} {claim}", stdout=True)
        return
    for command, name, _ in matches:
        show(f"{command} {name}\n\n{textwrap.indent(story(command, name), '    ')}\n", stdout=True)


_RECIPES_HELP = """usage: pecobook recipes [COMMAND] [NAME]

List the recipes and the claim of each; with a NAME show all of the recipe: claim, source, command, cost, result.

examples
  pecobook recipes codebook
  pecobook recipes codebook paper"""


def _completion(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help", "--help-all"):
        show(_COMPLETION_HELP, stdout=True)
        return
    if len(args) > 1:
        raise ConfigError(f"'completion' takes one shell, not {len(args)} words. See pecobook completion --help.")
    from pecobook.completion import script

    show(script(args[0], COMMANDS), stdout=True, end="")


_COMPLETION_HELP = """usage: pecobook completion bash|zsh|fish

Print a script with which the shell completes commands, recipes, flags and the choices of their values.

examples
  eval "$(pecobook completion bash)"                                          in ~/.bashrc
  eval "$(pecobook completion zsh)"                                           in ~/.zshrc, after compinit
  pecobook completion fish > ~/.config/fish/completions/pecobook.fish         once"""


# ------------------------------------------------------------------------------------------------------------- parsing


def _settings(command: str, args: list[str]) -> Any:
    """Return the settings from the words and flags after a command. Raises ConfigError."""
    count = next((position for position, word in enumerate(args) if word.startswith("-")), len(args))
    words, args = args[:count], args[count:]
    if command in (*RECIPES, "tokenize"):
        recipe = _recipe_name([*words, *args]) or recipes.DEFAULT_RECIPE
        words = words[1:]
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
    if command == "check" and named:
        _check_task(config_type, named[1])
    readers = (*RECIPES, "tokenize", "probe", "embed")
    unused = {name: kind for other in readers for name, kind in flags(table.COMMANDS[other].settings).items()}
    return parse(config_type(), [*named, *words, *args], command, unused if command == "check" else {})


def _check_task(config_type: Any, word: str) -> None:
    """Raise ConfigError if the first word after `check` is not a command that it knows."""
    tasks = [name for name in get_args(flags(config_type)["task"]) if name != "auto"]
    if word not in tasks:
        hint = f" For a path give --data '{word}'." if Path(word).exists() else did_you_mean(word, tasks)
        raise ConfigError(
            f"'check' takes the command that will read the images ({', '.join(tasks)}), not '{word}'.{hint}"
        )


def _recipe_name(args: list[str]) -> str:
    """Return the recipe named by the first word or the file of --config; otherwise the default, or "" for a file."""
    if args and not args[0].startswith("-"):
        return args[0]
    files = read_flags(args, {"config": str}, "", [])
    if "config" not in files:
        return recipes.DEFAULT_RECIPE
    try:
        return str(read_config(files["config"]).get("recipe") or "")
    except ConfigError:
        return ""  # `parse` reports the file


def parse(config: Any, args: list[str], prog: str, unused: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """Return `config` with the values of the flags in `args`. Raises ConfigError.

    With --help or --help-all in `args`, print the help and raise SystemExit.

    Args:
        config: settings with the default values.
        args: the command-line arguments.
        prog: the command and its recipe.
        unused: further flags, with the types of their values, that may be given and have no effect.
    """
    command, _, recipe = prog.partition(" ")
    if {"-h", "--help", "--help-all"} & set(args):
        from pecobook.help import every_flag, page

        describe = every_flag if "--help-all" in args else page
        show(describe(command, config, recipe if command in (*RECIPES, "tokenize") else ""), stdout=True)
        sys.exit(0)
    problems: list[str] = []
    own = {**flags(type(config)), "config": str}
    values = read_flags(args, {**unused, **own}, command, problems)
    values = {name: value for name, value in values.items() if flag(name) in own}
    try:
        if "config" in values:
            path = values.pop("config")
            config = of_run(config, path) if isinstance(config, CheckConfig) else load(config, path, command)
        config = replace(config, values)
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def read_flags(args: list[str], types: dict[str, Any], command: str, problems: list[str]) -> dict[str, Any]:
    """Convert `--name value`, `--name=value`, `--switch` and `--no-switch` to {dotted field: text, texts or bool}.

    Args:
        args: the command-line arguments.
        types: type of the value of each flag, as returned by `settings.values.flags`.
        command: name of the command, for error messages.
        problems: list to which a message is added for each unknown flag and each flag with a wrong number of values.
    """
    values: dict[str, Any] = {}
    position = 0
    while position < len(args):
        token = args[position]
        position += 1
        if not token.startswith("--"):
            problems.append(f"'{token}' is no flag: flags are written --name value. See pecobook {command} --help.")
            continue
        name, equals, text = token[2:].partition("=")
        name = flag(name)
        head, _, leaf = name.rpartition(".")
        positive = f"{head}.{leaf.removeprefix('no-')}".lstrip(".") if leaf.startswith("no-") else ""
        if is_switch(types.get(positive)):
            values[field_name(positive)] = False
            continue
        words = [text] if equals else []
        while not equals and position < len(args) and not args[position].startswith("--"):
            words.append(args[position])
            position += 1
        if name not in types:
            problems.append(f"Unknown flag '--{name}'.{_suggest(name, types)} See pecobook {command} --help.")
            continue
        try:
            # If a flag is given twice, the last one counts: scripts append flags to a command.
            values[field_name(name)] = _value(name, words, types[name], command)
        except ConfigError as error:
            problems.append(str(error))
    return values


def _value(name: str, words: list[str], kind: Any, command: str) -> Any:
    if str(kind).startswith("tuple"):
        return tuple(words[0].split(",")) if len(words) == 1 and "," in words[0] else tuple(words)
    if is_switch(kind) and not words:
        return True
    if not words or (name == "config" and words == [""]):
        raise ConfigError(f"--{name} needs a value.")
    recipe_names = RECIPES.get("pretrain" if command in ("tokenize", "bench") else command, {})
    if len(words) == 2 and words[1] in recipe_names:
        text = f"--{name} takes one value, not 2 ({' '.join(words)})"
        raise ConfigError(f"{text}: give the recipe '{words[1]}' before the flags.")
    if len(words) > 1:
        raise ConfigError(f"--{name} takes one value, not {len(words)} ({' '.join(words)}): quote a value with spaces.")
    return words[0]


def _suggest(name: str, flag_names: Iterable[str]) -> str:
    leaf = name.rpartition(".")[2]
    nested = [option for option in flag_names if option.rpartition(".")[2] == leaf]
    if nested:  # for --lr suggest --optim.lr
        return f" Did you mean '--{nested[0]}'?"
    return did_you_mean(name, flag_names).replace("'", "'--", 1)  # dashes would make all names more similar


if __name__ == "__main__":
    main()
