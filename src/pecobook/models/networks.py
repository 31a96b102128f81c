"""timm networks, built by name with arguments that only shape the network."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from pecobook.errors import WeightsError, did_you_mean, first_line

_WRONG_VALUE = (TypeError, ValueError, AssertionError, ArithmeticError, AttributeError, LookupError)


def architecture_arguments(timm_name: str) -> set[str]:
    """Return the names of the arguments that shape a timm network.

    These are the arguments of the network's class and of the related classes in timm's module, without those of
    `timm.create_model` itself, such as `checkpoint_path` and `pretrained_cfg`, and those of timm's weight loading.
    """
    import inspect

    import timm

    module = sys.modules[timm.model_entrypoint(timm_name.partition(".")[0]).__module__]
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, nn.Module)]
    names = {name for kind in classes for name in inspect.signature(kind.__init__).parameters}
    own = inspect.signature(timm.create_model).parameters
    return {name for name in names | _BUILDER_ARGUMENTS if name not in own and not name.startswith("pretrained")}


# Arguments that timm's functions read before they call the class.
_BUILDER_ARGUMENTS = {"drop_path_rate", "global_pool", "in_chans", "num_classes", "output_stride"}


_downloads = ContextVar("_downloads", default=True)


@contextmanager
def without_downloads() -> Iterator[None]:
    """Build networks with random weights instead of downloading weights, since the run is refused anyway."""
    token = _downloads.set(False)
    try:
        yield
    finally:
        _downloads.reset(token)


def downloads() -> bool:
    """Return whether weights may be downloaded here."""
    return _downloads.get()


def create_network(name: str, download: bool = False, /, **kwargs: Any) -> nn.Module:
    """Call `timm.create_model` with arguments of the architecture only.

    The arguments may come from someone else's config.json, and timm's function also has arguments that load files and
    request URLs.

    Args:
        name: timm name of the network.
        download: whether to use timm's pre-trained weights; positional only, so that no config.json can ask for it.
        kwargs: arguments of the network.

    Raises:
        WeightsError: there is no such network, or it does not accept the arguments.
    """
    import timm

    timm_name = name.removeprefix("timm:")
    if not timm.is_model(timm_name.partition(".")[0]):
        suggestion = did_you_mean(timm_name, timm.list_models()) or " timm.list_models() in Python lists the networks."
        raise WeightsError(f"timm has no network '{timm_name}'.{suggestion}")
    refused = sorted(kwargs.keys() - architecture_arguments(timm_name))
    if refused:
        raise WeightsError(f"timm's '{timm_name}' does not accept these arguments: {', '.join(refused)}.")
    try:
        network: nn.Module = timm.create_model(timm_name, pretrained=download and downloads(), **kwargs)
    except (OSError, RuntimeError, *_WRONG_VALUE) as error:
        if not download or isinstance(error, TypeError):
            reason = first_line(error).rstrip(".")
            if "argument 'drop_path_rate'" in reason:  # which may be the recipe's
                raise WeightsError(f"timm's '{timm_name}' has no stochastic depth: give --drop-path 0.") from None
            raise WeightsError(f"timm cannot build '{timm_name}' with {kwargs}: {reason}. Change these.") from None
        raise WeightsError(
            f"The weights of timm's '{timm_name}' cannot be downloaded ({first_line(error)}).\n"
            "Check the internet connection, give a local file of weights, or use random weights."
        ) from None
    return network
