"""Settings of Weights & Biases and MLflow."""

from __future__ import annotations

from pecobook.settings.values import different, settings_class


@settings_class
class TrackingConfig:
    """Where Weights & Biases and MLflow keep a run, for --loggers wandb and mlflow."""

    project: str = "pecobook"
    """Weights & Biases project, or MLflow experiment."""
    entity: str = ""
    """Weights & Biases user or team; empty uses the account's default. MLflow has none."""
    group: str = ""
    """Name shared by the runs of a sweep: the Weights & Biases group, or an MLflow tag."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""
    offline: bool = False
    """Send nothing: the files stay in the run folder, where `wandb sync` or `mlflow ui` can read them."""

    def __post_init__(self) -> None:
        different(self, "tags")
