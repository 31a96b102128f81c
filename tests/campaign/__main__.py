"""Run the campaign for so many minutes, and print what was disturbed, how often, and whether it ended as promised.

python -m tests.campaign --minutes 30 --seed 0 --out runs/campaign [--only kills disks] [--long]
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import random
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

_MODULES = ("mistakes", "hostile", "damages", "processes", "disks", "kills")


def main() -> int:
    """Run the campaign; return 0 when every case ended as promised."""
    options = _options()
    os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as pecobook sets it for processes that a launcher has started
    from tests.campaign.process import warm_up
    from tests.campaign.verdict import Field, Verdict, table

    if options.out.exists() and any(options.out.iterdir()):
        if not (options.out / "verdicts.jsonl").exists():
            sys.exit(f"{options.out} holds something else than a campaign: name another --out.")
        shutil.rmtree(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "verdicts.jsonl").touch()
    verdicts: list[Verdict] = []
    if options.long:
        from tests.campaign.long import measure

        return measure(options.out, options.minutes, options.steps)
    warm_up()
    field, stop = Field(options.out.resolve(), options.seed), time.monotonic() + 60 * options.minutes
    with (options.out / "verdicts.jsonl").open("w") as lines:
        for case, chance in _handful(options.seed) if options.short else _drawn(options):
            if time.monotonic() > stop:
                break
            for verdict in _tried(case, field, chance):
                verdicts.append(verdict)
                lines.write(json.dumps(dataclasses.asdict(verdict)) + "\n")
                lines.flush()
                if verdict.fault:
                    print(f"{verdict.group}: {verdict.case}: {verdict.fault}", file=sys.stderr, flush=True)
    text = table(verdicts)
    (options.out / "table.txt").write_text(text + "\n")
    print(text)
    return int(any(verdict.fault for verdict in verdicts))


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/campaign"))
    parser.add_argument("--only", nargs="*", choices=_MODULES, default=_MODULES, help="kinds of faults")
    parser.add_argument("--named", default="", help="a part of the name of the cases, as rank or worker of processes")
    parser.add_argument("--leave-out", nargs="*", default=(), help="commands, for example demo reproduce")
    parser.add_argument("--short", action="store_true", help="a handful of cases")
    parser.add_argument("--long", action="store_true", help="measure memory, files and requests over a long time")
    parser.add_argument("--steps", type=int, default=100_000, help="steps of the stream of --long")
    return parser.parse_args()


def _drawn(options: Any) -> Any:
    """Yield (case, random numbers) without end: all cases of all modules, in another order each time."""
    chance, left_out = random.Random(options.seed), set(options.leave_out)
    cases = [case for name in options.only for case in importlib.import_module(f"tests.campaign.{name}").cases()]
    cases = [case for case in cases if not left_out & {str(part) for part in getattr(case, "args", ())}]
    cases = [case for case in cases if options.named in getattr(case, "func", case).__name__]
    once = [case for case in cases if getattr(case, "__name__", "") == "_all"]
    yield from ((case, chance) for case in once)
    rest = [case for case in cases if case not in once]
    while rest:
        chance.shuffle(rest)
        yield from ((case, random.Random(chance.random())) for case in rest)


def _handful(seed: int) -> Any:
    """Yield one case of each kind, all of `codebook`."""
    from tests.campaign import damages, disks, hostile, kills

    codebook = [kills.at_crash_points, kills.by_power_cuts]
    cases = [kind("codebook") for kind in codebook] + [
        case for module in (damages, disks) for case in module.cases()[:1]
    ]
    yield from ((case, random.Random(seed + number)) for number, case in enumerate([*cases, hostile.cases()[0]]))


def _tried(case: Any, field: Any, chance: random.Random) -> Any:
    """Yield the verdicts of a case; an error of the campaign itself is a verdict too."""
    from tests.campaign.verdict import Verdict

    try:
        yield from case(field, chance)
    except Exception as error:
        traceback.print_exc()
        name = f"{getattr(case, 'func', case).__name__} {getattr(case, 'args', '')}"
        yield Verdict("campaign", name[:120], repr(error)[:400])


if __name__ == "__main__":
    sys.exit(main())
