"""What is tuned for each arm of the duel (docs/study.md); nothing here imports torch."""

from __future__ import annotations

import dataclasses

DUEL, TUNING = "duel", "duel-tuning"
"""The two tables of `pecobook reproduce` that are the study rather than the paper's."""
ARMS = {
    "scratch": "no pre-training",
    "pixels": "pixels of hidden patches (MAE)",
    "pixel": "tokens, pixel loss alone",
    "perceptual": "tokens, perceptual loss",
    "classification": "tokens, classification loss (knows the labels)",
    "supervised": "tokens, perceptual loss of a supervised network (knows the labels)",
    "public": "tokens, perceptual loss of --network (has seen other images)",
}
"""Label of each arm's row, without the two controls."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is tuned for an arm, on validation images."""

    lr: float = 1e-3
    """Learning rate of pre-training; for random weights, which are not pre-trained, that of fine-tuning."""
    rising: bool = False
    """Whether lambda rises over the first half of the codebook's training."""

    @property
    def name(self) -> str:
        """The setting as part of job names."""
        return f"{'rising-' if self.rising else ''}lr{self.lr:g}"


def settings_of(arm: str) -> tuple[Setting, ...]:
    """Return the settings that are tried for an arm, the default first."""
    has_network = arm.partition("-")[0] in ("perceptual", "supervised", "public")
    return tuple(Setting(lr, rising) for rising in (False, True)[: 1 + has_network] for lr in (1e-3, 3e-3))


def run_name(arm: str, setting: Setting) -> str:
    """Return the name that jobs use for an arm with a setting."""
    return f"{arm}+{setting.name}"


def parse_run(run: str) -> tuple[str, Setting]:
    """Return the arm and setting from a name that `run_name` made."""
    arm, _, name = run.partition("+")
    return arm, next(setting for setting in settings_of(arm) if setting.name == name)
