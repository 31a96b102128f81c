"""Settings of Weights & Biases and MLflow."""

from __future__ import annotations

from pecobook.settings.values import different, settings_class


@settings_class
class TrackingConfig:
    """Where Weights & Biases and MLflow keep a run, for --loggers wandb and mlflow."""

    project: str = "pecobook"
    """Project of Weights & Biases; experiment of MLflow."""
    entity: str = ""
    """User or team of Weights & Biases; empty takes the default of the account. MLflow has none."""
    group: str = ""
    """Name that runs of a sweep have in common: the group of Weights & Biases, a tag of MLflow."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""
    offline: bool = False
    """Send nothing: the files stay in the run folder, and `wandb sync` or `mlflow ui` reads them there."""

    def __post_init__(self) -> None:
        different(self, "tags")
