"""The command line: one short function a command. Nothing heavy is imported before a command needs it.

Flags, Python keywords and config.json take one way to a setting (`pecobook.settings.values.replace`), so they know the
same names and give the same errors; tyro draws the help of each command from the settings' own explanations.
"""

from __future__ import annotations

import errno
import os
import sys
import textwrap
from typing import Any

from pecobook.errors import ConfigError, PecobookError, did_you_mean
from pecobook.settings.values import flags, load, replace

_TRAINING = {
    "contrast": "train a feature network on your own images (MoCo v3)",
    "codebook": "train a perceptual codebook (the PeCo tokenizer)",
    "pretrain": "pre-train a ViT on the tokens of your images",
    "finetune": "fine-tune a backbone for classification",
    "segment": "train semantic segmentation on a backbone (UperNet)",
    "detect": "train boxes and instance masks on a backbone (Mask R-CNN)",
}
_OTHERS = {
    "tokenize": "the tokens of named views of your images, once, for pretrain --tokens",
    "analyze": "what the codewords of tokenizers mean: figures, galleries, a report",
    "explore": "a page to play with codewords and masks, on this machine",
    "reproduce": "the paper's tables, trained again at a budget of yours, with controls, over seeds",
    "bench": "how fast pre-training runs here, and where time goes",
    "export": "a run's weights for timm, transformers or ONNX",
    "predict": "what a trained classifier, segmenter or detector says of images",
    "probe": "linear probe and k-NN of a backbone, or of a tokenizer's codewords",
    "demo": "the whole story on built-in photographs, with a report, in minutes",
    "recipes": "list the recipes and what each claims",
    "completion": "a script with which bash, zsh or fish completes commands, recipes and flags",
}
COMMANDS = {**_TRAINING, **_OTHERS}


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
        resumes = bool(args) and args[0] in (*_TRAINING, "tokenize")
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
    if command in _TRAINING:
        _train(command, rest)
    else:
        {
            "tokenize": _tokenize,
            "export": _export,
            "predict": _predict,
            "bench": _bench,
            "analyze": _analyze,
            "explore": _explore,
            "reproduce": _reproduce,
            "probe": _probe,
            "demo": _demo,
            "recipes": _recipes,
            "completion": _completion,
        }[command](rest)


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


def _train(command: str, args: list[str]) -> None:
    from pecobook.recipes import DEFAULT_RECIPE, recipe

    name = args.pop(0) if args and not args[0].startswith("-") else DEFAULT_RECIPE
    config = parse(recipe(command, name), args, f"{command} {name}")
    from pecobook.api import run

    run(command, config)


def _tokenize(args: list[str]) -> None:
    from pecobook import recipes

    name = args.pop(0) if args and not args[0].startswith("-") else recipes.DEFAULT_RECIPE
    config = parse(recipes.tokenize(name), args, f"tokenize {name}")
    from pecobook.commands.tokenize import tokenize

    tokenize(config)


def _export(args: list[str]) -> None:
    from pecobook.settings.export import ExportConfig

    run = ["--run", args.pop(0)] if args and not args[0].startswith("-") else []
    config = parse(ExportConfig(), [*run, *args], "export")
    from pecobook.commands.export import export

    export(config)


def _predict(args: list[str]) -> None:
    from pecobook.settings.predict import PredictConfig

    words = [args.pop(0) for _ in range(2) if args and not args[0].startswith("-")]
    named = [text for name, word in zip(("--run", "--images"), words, strict=False) for text in (name, word)]
    config = parse(PredictConfig(), [*named, *args], "predict")
    from pecobook.commands.predict import predict

    predict(config)


def _bench(args: list[str]) -> None:
    from pecobook.settings.bench import BenchConfig

    if not args or args[0] not in ("pretrain", "-h", "--help", "--help-all"):
        raise ConfigError("'bench' measures pretrain: pecobook bench pretrain [RECIPE] [--flag value ...]")
    rest = args[1:] if args[0] == "pretrain" else args
    recipe = ["--recipe", rest.pop(0)] if rest and not rest[0].startswith("-") else []
    config = parse(BenchConfig(), [*recipe, *rest], "bench pretrain")
    from pecobook.commands.bench import bench

    bench(config)


def _analyze(args: list[str]) -> None:
    from pecobook.settings.analyze import AnalyzeConfig

    config = parse(AnalyzeConfig(), args, "analyze")
    from pecobook.commands.analyze import analyze

    analyze(config)


def _reproduce(args: list[str]) -> None:
    from pecobook.settings.reproduce import ReproduceConfig

    config = parse(ReproduceConfig(), _first_as("--tables", args), "reproduce")
    from pecobook.commands.reproduce import reproduce

    reproduce(config)


def _explore(args: list[str]) -> None:
    from pecobook.settings.explore import ExploreConfig

    config = parse(ExploreConfig(), _first_as("--runs", args), "explore")
    from pecobook.commands.explore import explore

    explore(config)


def _first_as(name: str, args: list[str]) -> list[str]:
    """Give the words before the first flag to a flag."""
    count = next((place for place, word in enumerate(args) if word.startswith("-")), len(args))
    return [name, *args] if count else args


def _probe(args: list[str]) -> None:
    from pecobook.settings.probe import ProbeConfig

    config = parse(ProbeConfig(), args, "probe")
    from pecobook.commands.probe import probe

    probe(config)


def _demo(args: list[str]) -> None:
    from pecobook.settings.demo import DemoConfig

    config = parse(DemoConfig(), args, "demo")
    from pecobook.commands.demo import demo

    demo(config)


def _recipes(args: list[str]) -> None:
    from pecobook.recipes import RECIPES, claims, story

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


def parse(config: Any, args: list[str], prog: str) -> Any:
    """Settings `config` with the values that the flags in `args` give. Raises ConfigError."""
    if "--help-all" in args:
        _explain(config, prog)
    if "-h" in args or "--help" in args:
        from pecobook.help import page
        from pecobook.recipes import RECIPES

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
