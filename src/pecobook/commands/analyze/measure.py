"""Figures of one tokenizer; every tokenizer sees the same images, each at its own size.

N images, codes int64 (N, h, w), K codewords.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pecobook.analysis.arrays import Array
from pecobook.analysis.codewords import CodeUsage, bag_of_codes, code_usage, mean_codewords
from pecobook.analysis.figures import gallery_picture
from pecobook.analysis.probe import linear_probe
from pecobook.analysis.reconstruction import decode_all, encode_all, psnr, ssim
from pecobook.analysis.semantics import information, patch_colours, patch_edges, patch_labels
from pecobook.analysis.similarity import agreement, code_distance, pixel_distance, read_bapps, shifted_preferred
from pecobook.analysis.stability import stability
from pecobook.commands.analyze.bank import bank_gallery, bank_usage, find_occurrences
from pecobook.commands.analyze.pictures import PATCHES, pictures_of, shown_codewords, spread
from pecobook.commands.extract import extract
from pecobook.commands.jobs import say
from pecobook.data.stream import read_all
from pecobook.utils.devices import device
from pecobook.utils.images import to_float

if TYPE_CHECKING:
    from pecobook.commands.analyze.inputs import AnalysisInputs, TokenizerInput
    from pecobook.data.source import ImageSource
    from pecobook.data.tokens import TokenBank
    from pecobook.models.perceptual import PerceptualDistance
    from pecobook.settings.analyze import AnalyzeConfig

_STABLE = 500  # images whose codes are compared with those of their distorted copies
_JUDGED = 200  # images whose shifted and blurred copies are compared


@dataclasses.dataclass(frozen=True)
class TokenizerMetrics:
    """What was found of one tokenizer."""

    name: str
    figures: dict[str, Any]
    images: Tensor
    """The images shown, float (n, 3, S, S)."""
    restored: Tensor
    usage: CodeUsage
    correct: dict[str, NDArray[np.bool_]]
    """By probe, which held-out images it classified correctly; empty without labels."""


Draw = Callable[[], dict[str, bytes]]
"""Makes pictures, by kind."""
TrainCodes = Callable[[], tuple[Tensor, Tensor] | None]
"""Codes and labels of the training images; None where there are no labels."""


def evaluate_tokenizer(
    name: str,
    tokenizer: Any,
    images: Tensor,
    labels: Tensor | None,
    train: TrainCodes,
    distance: PerceptualDistance | None,
    *,
    seed: int,
) -> tuple[TokenizerMetrics, Tensor, Tensor]:
    """How a tokenizer uses its codewords, what it keeps of held-out images, and how well its codes tell classes apart.

    Args:
        name: what the tokenizer is called.
        tokenizer: the tokenizer, which is moved to the device.
        images: held out, float (N, 3, S, S) in [0, 1], of the tokenizer's size.
        labels: of the images, int64 (N,), or None, and then `train` is not called.
        train: gives codes and labels of training images.
        distance: measured between images and reconstructions, where it is given.
        seed: of the probes' validation part.

    Returns:
        what was found, the codes int64 (N, h, w) and the reconstructions (N, 3, S, S), all on the host.
    """
    tokenizer = tokenizer.to(device()).eval()
    K = tokenizer.num_codewords
    codes = encode_all(tokenizer, images)
    restored = decode_all(tokenizer, codes)
    usage = code_usage(codes, K)
    found: dict[str, Any] = {
        "name": name,
        "num_codewords": K,
        "stride": tokenizer.stride,
        "image_size": tokenizer.image_size,
        "num_images": len(images),
        "codes_used": usage.codes_used,
        "perplexity": round(usage.perplexity, 2),
        "unused": _few(np.flatnonzero(usage.counts == 0).tolist()),
        "psnr": _rounded(psnr(images, restored).mean()),
        "ssim": _rounded(ssim(images, restored).mean(), 4),
        "perceptual_distance": None,
    }
    if distance is not None:
        found["perceptual_distance"] = _rounded(_distances(distance, images, restored).mean(), 4)
    probed, correct = _probes(tokenizer, codes, labels, train, seed)
    shown = spread(len(images))
    return TokenizerMetrics(name, found | probed, images[shown], restored[shown], usage, correct), codes, restored


def analyze_tokenizer(
    config: AnalyzeConfig, tokenizer_input: TokenizerInput, inputs: AnalysisInputs
) -> tuple[TokenizerMetrics, list[str], Draw]:
    """Everything about one tokenizer, the images that could not be read, and what draws its pictures."""
    tokenizer = tokenizer_input.tokenizer
    pixels, labels, skipped = read_all(inputs.splits.evaluation, tokenizer.image_size, limit=config.max_test)
    images = to_float(pixels)
    say(f"  {len(images)} images to codes and back" + (f", {len(skipped)} could not be read" if skipped else ""))
    train = partial(_train_codes, config, tokenizer_input, inputs)
    what, codes, restored = evaluate_tokenizer(
        tokenizer_input.name, tokenizer, images, labels, train, inputs.distance, seed=config.seed
    )
    K, found, usage = tokenizer.num_codewords, what.figures, what.usage
    found["source"] = tokenizer_input.source
    say("  classes, colours and edges that codes go with")
    found["information"] = _information(config, K, images, codes, labels)
    if inputs.classifier is not None:
        given = inputs.classifier
        found["classifier"] = {
            "originals": given.accuracy(images, labels),
            "reconstructions": given.accuracy(restored, labels),
        }
    say("  codes of distorted images")
    kept = stability(tokenizer, images[:_STABLE], codes[:_STABLE], tokenizer.stride)
    found["stability"] = {name: round(value, 2) for name, value in kept.items()}
    found["similarity"] = _similarity(inputs, tokenizer, images)
    drawn: list[Draw] = [partial(_pictures, config, inputs, tokenizer, images, codes, labels, usage)]
    if tokenizer_input.bank is not None:
        say(f"  the token bank {tokenizer_input.bank.folder}")
        found["bank"], draw_bank = _bank(config, tokenizer_input.bank, K, inputs.splits.train)
        drawn.append(draw_bank)
    tokenizer_input.tokenizer.cpu()
    return what, skipped, lambda: {kind: png for draw in drawn for kind, png in draw().items()}


def _few(codewords: list[int]) -> list[int] | None:
    """Numbers that a person may read; None for more than fifty."""
    return codewords if len(codewords) <= 50 else None


def _pictures(
    config: AnalyzeConfig,
    inputs: AnalysisInputs,
    tokenizer: Any,
    images: Tensor,
    codes: Tensor,
    labels: Tensor | None,
    usage: CodeUsage,
) -> dict[str, bytes]:
    say("  pictures")
    classes = inputs.splits.evaluation.classes or ()
    return pictures_of(
        tokenizer, images, codes, labels, usage, classes=classes, asked=config.codewords, seed=config.seed
    )


def _bank(
    config: AnalyzeConfig, bank: TokenBank, num_codewords: int, train: ImageSource
) -> tuple[dict[str, Any], Draw]:
    """Usage over all training images, and what draws a gallery of places among all of them."""
    usage = bank_usage(bank, num_codewords)
    chosen = shown_codewords(usage, config.codewords, config.seed)
    places = find_occurrences(bank, chosen, num_codewords, patches=PATCHES, seed=config.seed)
    figures = {
        "folder": str(bank.folder),
        "num_images": bank.layouts["train"].num_images - len(bank.skipped),
        "num_views": bank.num_views,
        "codes_used": usage.codes_used,
        "perplexity": round(usage.perplexity, 2),
    }
    return figures, lambda: {"bank-gallery": gallery_picture(bank_gallery(bank, train, places))}


def _rounded(value: Any, digits: int = 3) -> float | None:
    number = float(value)
    return round(number, digits) if np.isfinite(number) else None


@torch.inference_mode()
def _distances(distance: PerceptualDistance, x: Tensor, y: Tensor) -> Tensor:
    """Of pairs of images (N, 3, S, S), a batch at a time: float (N,) on the host."""
    pairs = zip(torch.split(x, 64), torch.split(y, 64), strict=True)
    return torch.cat([distance(a.to(device()), b.to(device())).cpu() for a, b in pairs])


def _train_codes(
    config: AnalyzeConfig, tokenizer_input: TokenizerInput, inputs: AnalysisInputs
) -> tuple[Tensor, Tensor] | None:
    train, tokenizer = inputs.splits.train, tokenizer_input.tokenizer
    if train.labels is None:
        return None
    seen, labels = extract(
        train,
        tokenizer.image_size,
        config.max_train,
        lambda images: {"codes": encode_all(tokenizer, images)},
        f"codes of {tokenizer_input.name}",
    )
    assert labels is not None
    return seen["codes"], labels


def _probes(
    tokenizer: Any, codes: Tensor, labels: Tensor | None, train: TrainCodes, seed: int
) -> tuple[dict[str, Any], dict[str, NDArray[np.bool_]]]:
    """Linear probes of mean codewords and of bags of codes (paper, Table 4, left); None without labels."""
    found: dict[str, Any] = dict.fromkeys(
        ("codeword_probe", "codeword_probe_error", "bag_probe", "bag_probe_error", "num_train")
    )
    correct: dict[str, NDArray[np.bool_]] = {}
    given = train() if labels is not None else None
    if labels is None or given is None:
        return found, correct
    seen, own = given
    book, K = tokenizer.codebook.detach().float().cpu(), tokenizer.num_codewords
    for name, pair in (
        ("codeword_probe", [mean_codewords(part, book) for part in (seen, codes)]),
        ("bag_probe", [bag_of_codes(part, K) for part in (seen, codes)]),
    ):
        result = linear_probe(pair[0], own, pair[1], labels, seed=seed)
        found[name], found[f"{name}_error"] = round(result.accuracy, 3), round(result.standard_error, 3)
        correct[name] = result.correct
    return found | {"num_train": len(own)}, correct


def _information(
    config: AnalyzeConfig, num_codewords: int, images: Tensor, codes: Tensor, labels: Tensor | None
) -> dict[str, dict[str, float]]:
    """What codes tell of classes, where there are labels, and of colours and edges beside them."""
    grid = (codes.shape[1], codes.shape[2])
    values: dict[str, Array] = {} if labels is None else {"label": patch_labels(labels, grid)}
    values |= {"colour": patch_colours(images, grid), "edges": patch_edges(images, grid)}
    told = {what: information(codes, value, num_codewords, seed=config.seed) for what, value in values.items()}
    return {
        what: {name: round(value, 4) for name, value in dataclasses.asdict(one).items()} for what, one in told.items()
    }


def _similarity(inputs: AnalysisInputs, tokenizer: Any, images: Tensor) -> dict[str, Any]:
    """Two-alternative judgements of pixels, of this tokenizer's codewords and of the perceptual distance."""
    compared: dict[str, Any] = {"pixels": pixel_distance, "codewords": code_distance(tokenizer)}
    if inputs.distance is not None:
        compared["perceptual"] = partial(_distances, inputs.distance)
    preferred = {name: round(shifted_preferred(images[:_JUDGED], d), 2) for name, d in compared.items()}
    found: dict[str, Any] = {"shifted_over_blurred": preferred}
    if inputs.judgements:
        triplets = read_bapps(inputs.judgements, tokenizer.image_size)
        found["agreement_with_people"] = {name: round(agreement(triplets, d), 2) for name, d in compared.items()}
        found["judgements"] = len(triplets.prefer_second)
    return found
