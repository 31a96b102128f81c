"""The field's other quantizers, as controls for the perceptual codebook: another bottleneck in the same autoencoder.

    fsq     finite scalar quantization (arXiv 2309.15505): each channel is bounded and rounded to a few levels
    lfq     lookup-free quantization (arXiv 2310.05737): each channel is -1 or 1, with an entropy loss
    simvq   SimVQ (arXiv 2411.02038): a fixed random codebook under one learned linear map
    ibq     index backpropagation (arXiv 2412.02692): the gradient reaches all codewords through a softmax

They have the interface of `VectorQuantizer`: `forward`, `encode`, `lookup`, `nearest`, `update`, and a `codebook`.
`fsq` and `lfq` need no projections: the encoder's last convolution has one channel per factor. Their codewords are all
combinations, in the order of vector-quantize-pytorch.

B batch, D codeword dimension, h w latent grid, N = B h w vectors, K codewords.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.models.nearest import nearest_codeword
from pecobook.models.quantizer import Quantized, Quantizer, VectorQuantizer
from pecobook.settings.tokenizer import VectorQuantizerConfig
from pecobook.utils.distributed import world_size

_TILE_ELEMENTS = 2**25
"""Number of elements that each tensor of IBQ's softmax holds in memory at a time."""


class _Vectors(NamedTuple):
    """A quantizer's result for vectors (N, D)."""

    quantized: Tensor
    """(N, D), with its gradient."""
    codes: Tensor
    """int64 (N,)."""
    commitment: Tensor
    """(), which --quantizer.commitment weighs."""
    loss: Tensor
    """(), the quantizer's own loss."""


class ControlQuantizer(Quantizer):
    """The common part of the quantizers here: their own learning rule, and no revival.

    Args:
        config: the settings.
        dim: D.
    """

    starts_now = False
    """False: no k-means initialisation waits for the first batch."""

    def __init__(self, config: VectorQuantizerConfig, dim: int) -> None:
        super().__init__(config, dim)
        self._counts: Tensor | None = None

    def forward(self, z: Tensor) -> Quantized:
        """Quantise z (B, D, h, w). In training mode, also count the codes for the next `update`."""
        B, D, h, w = z.shape
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            if self.training and self._bypass:
                return self._unquantised(z)
            out = self._quantise(z.permute(0, 2, 3, 1).reshape(-1, D))
            if self.training:
                counts = torch.zeros_like(self.usage)
                counts.index_add_(0, out.codes, counts.new_ones(len(out.codes)))
                self._counts = counts if self._counts is None else self._counts + counts
        quantized = out.quantized.view(B, h, w, D).permute(0, 3, 1, 2).contiguous()
        return Quantized(quantized, out.codes.view(B, h, w), out.commitment, out.loss)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Return the codewords of z (B, D, h, w), without gradient; z itself in the steps without quantisation."""
        if self.training and self._bypass:
            return z.float()
        return self.lookup(self.encode(z))

    def start(self, z: Tensor) -> None:
        """Do nothing; `VectorQuantizer` starts its codebook here."""

    @torch.no_grad()
    def update(self) -> None:
        """Update the usage counts with the codes of all ranks since the last call. Call it once per step."""
        if self._counts is not None:
            counts, self._counts = self._counts, None
            if world_size() > 1:
                dist.all_reduce(counts)
            self.usage.lerp_(counts, 1 - self.config.decay)
            self.unused.add_(1).masked_fill_(counts > 0, 0)
        elif not self._bypassed:
            return
        self._next_step()

    def _quantise(self, vectors: Tensor) -> _Vectors:
        """Quantise vectors (N, D)."""
        raise NotImplementedError

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._counts = None


def straight_through(vectors: Tensor, codewords: Tensor) -> Tensor:
    """Return the codewords, with the gradient of the vectors."""
    return vectors + (codewords - vectors).detach()


class FiniteScalarQuantizer(ControlQuantizer):
    """FSQ: tanh bounds each channel to its number of levels, which are integers divided by half their number."""

    levels: Tensor
    basis: Tensor

    def __init__(self, config: VectorQuantizerConfig, dim: int) -> None:
        super().__init__(config, dim)
        levels = torch.tensor(config.levels, dtype=torch.int64)
        basis = torch.cumprod(torch.cat([levels.new_ones(1), levels[:-1]]), 0)
        digits = torch.arange(self.num_codewords)[:, None] // basis % levels  # (K, D)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("basis", basis, persistent=False)
        self.register_buffer("codebook", (digits - levels // 2) / (levels // 2))

    def _bound(self, vectors: Tensor) -> Tensor:
        """Return values that round to the levels, from -(L // 2) upwards."""
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = 0.5 * (self.levels % 2 == 0)
        return torch.tanh(vectors + torch.atanh(offset / half)) * half - offset

    def _index(self, rounded: Tensor) -> Tensor:
        return ((rounded.long() + self.levels // 2) * self.basis).sum(1)

    def _codes(self, vectors: Tensor) -> Tensor:
        return self._index(self._bound(vectors).round())

    def _quantise(self, vectors: Tensor) -> _Vectors:
        bounded = self._bound(vectors)
        rounded = bounded.detach().round()
        zero = vectors.new_zeros(())
        return _Vectors(straight_through(bounded, rounded) / (self.levels // 2), self._index(rounded), zero, zero)


class LookupFreeQuantizer(ControlQuantizer):
    """LFQ: the signs of the channels are the bits of the code, the first channel the highest bit."""

    bits: Tensor

    def __init__(self, config: VectorQuantizerConfig, dim: int) -> None:
        super().__init__(config, dim)
        bits = 2 ** torch.arange(dim - 1, -1, -1)
        self.register_buffer("bits", bits, persistent=False)
        digits = torch.arange(self.num_codewords)[:, None] // bits % 2
        self.register_buffer("codebook", 2.0 * digits - 1)

    def _codes(self, vectors: Tensor) -> Tensor:
        return ((vectors > 0) * self.bits).sum(1)

    def _quantise(self, vectors: Tensor) -> _Vectors:
        signs = torch.where(vectors > 0, 1.0, -1.0)
        commitment = F.mse_loss(vectors, signs)
        loss = vectors.new_zeros(())
        if self.config.entropy_weight > 0 and self.training:
            of_vectors, of_codebook = sign_entropies(vectors / self.config.entropy_temperature)
            loss = self.config.entropy_weight * (of_vectors - of_codebook)
        return _Vectors(straight_through(vectors, signs), self._codes(vectors), commitment, loss)


def sign_entropies(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """Return LFQ's entropies in nats: the mean entropy of a vector's codes, and the entropy of the mean over vectors.

    The probability of a code is a softmax of 2 z . c over all sign codewords c, so its bits are independent, with log
    odds 4 z: the first entropy is a sum over bits. The mean over vectors is the product of two matrices, which hold the
    probabilities of the first and of the second half of the bits. Thus nothing has N x K elements.

    Args:
        scaled: (N, D) vectors divided by the temperature.
    """
    log_odds = 4 * scaled
    positive, negative = F.logsigmoid(log_odds), F.logsigmoid(-log_odds)
    of_vectors = -(positive.exp() * positive + negative.exp() * negative).sum(1).mean()
    probability, half = torch.sigmoid(log_odds), scaled.shape[1] // 2
    first, second = _joint(probability[:, :half]), _joint(probability[:, half:])
    mean = first.T @ second / len(scaled)  # the distribution over all K codes
    return of_vectors, -torch.special.xlogy(mean, mean.clamp_min(1e-20)).sum()


def _joint(probability: Tensor) -> Tensor:
    """Return the probabilities of all combinations of independent bits: (N, b) to (N, 2^b)."""
    joint = probability.new_ones(len(probability), 1)
    for p in probability.unbind(1):
        joint = torch.stack([joint * (1 - p[:, None]), joint * p[:, None]], 2).flatten(1)
    return joint


class SimVQ(ControlQuantizer):
    """SimVQ: codewords are rows of a fixed Gaussian matrix times a learned matrix, so each step moves all of them."""

    frozen: Tensor  # (K, D)

    def __init__(self, config: VectorQuantizerConfig, dim: int) -> None:
        super().__init__(config, dim)
        self.register_buffer("frozen", torch.randn(self.num_codewords, dim) / dim**0.5)
        self.transform = nn.Parameter(torch.empty(dim, dim))
        nn.init.kaiming_uniform_(self.transform, a=math.sqrt(5))

    @property
    def codebook(self) -> Tensor:  # type: ignore[override]
        """Codewords (K, D), computed on access."""
        return F.linear(self.frozen, self.transform)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters without weight decay."""
        return {"transform"}

    @torch.no_grad()
    def _codes(self, vectors: Tensor) -> Tensor:
        return nearest_codeword(vectors, self.codebook, precision=self.config.precision if self.training else "fp32")

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the codewords of codes: int64 (B, h, w) to (B, D, h, w)."""
        return F.linear(F.embedding(codes, self.frozen), self.transform).permute(0, 3, 1, 2).contiguous()

    def _quantise(self, vectors: Tensor) -> _Vectors:
        codes = self._codes(vectors.detach())
        codewords = F.linear(self.frozen[codes], self.transform)
        commitment, loss = F.mse_loss(vectors, codewords.detach()), F.mse_loss(codewords, vectors.detach())
        return _Vectors(straight_through(vectors, codewords), codes, commitment, loss)


class IndexBackpropagationQuantizer(ControlQuantizer):
    """IBQ: the code is the codeword with the largest product with the vector.

    The forward pass uses that codeword; the backward pass uses the softmax of the products instead of the choice, so
    that the gradient of the image reaches all codewords. Its loss is the authors' without their commitment term, whose
    weight is 1 there: ||q - z||^2 with the gradient of the softmax, ||e - sg[z]||^2 / 4, and the entropy loss.
    """

    def __init__(self, config: VectorQuantizerConfig, dim: int) -> None:
        super().__init__(config, dim)
        self.codebook = nn.Parameter(torch.randn(self.num_codewords, dim))

    def _codes(self, vectors: Tensor) -> Tensor:
        rows = max(_TILE_ELEMENTS // self.num_codewords, 1)
        return torch.cat([(part @ self.codebook.T).argmax(1) for part in torch.split(vectors, rows)])

    def _quantise(self, vectors: Tensor) -> _Vectors:
        config, rows = self.config, max(_TILE_ELEMENTS // self.num_codewords, 1)
        temperature = config.entropy_temperature if config.entropy_weight > 0 and self.training else 0.0
        quantized, codes, mean, of_vectors = _IndexBackpropagation.apply(vectors, self.codebook, temperature, rows)
        codewords = F.embedding(codes, self.codebook)
        commitment = F.mse_loss(vectors, codewords.detach())
        loss = F.mse_loss(quantized, vectors) + 0.25 * F.mse_loss(codewords, vectors.detach())
        if temperature:
            entropy = -(mean * (mean + 1e-5).log()).sum()
            loss = loss + config.entropy_weight * (of_vectors - entropy)
        return _Vectors(quantized, codes, commitment, loss)


class _IndexBackpropagation(torch.autograd.Function):
    """The choice of codewords with a softmax's gradient, in tiles of vectors: nothing has N x K elements.

    Maps vectors (N, D) and codewords (K, D) to the chosen codewords (N, D), the codes (N,), the mean over vectors of
    softmax(products / temperature), (K,), and the mean entropy of these softmaxes, (). The last two are 0 if the
    temperature is 0.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, codebook: Tensor, temperature: float, rows: int) -> tuple[Tensor, ...]:
        codes, mean = [], codebook.new_zeros(len(codebook))
        entropy = codebook.new_zeros(())
        for part in torch.split(vectors, rows):
            products = part @ codebook.T  # (n, K)
            codes.append(products.argmax(1))
            if temperature:
                logs = (products / temperature).log_softmax(1)
                probabilities = logs.exp()
                mean += probabilities.sum(0) / len(vectors)
                entropy -= (probabilities * logs).sum() / len(vectors)
        chosen = torch.cat(codes)
        ctx.save_for_backward(vectors, codebook, chosen)
        ctx.temperature, ctx.rows = temperature, rows
        ctx.mark_non_differentiable(chosen)
        return codebook[chosen], chosen, mean, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        vectors, codebook, chosen = ctx.saved_tensors
        of_quantized, _, of_mean, of_entropy = gradients
        # The value of the one-hot choice: each chosen codeword gets the gradient of its vectors.
        of_codebook = torch.zeros_like(codebook).index_add_(0, chosen, of_quantized)
        of_vectors = torch.empty_like(vectors)
        for start in range(0, len(vectors), ctx.rows):
            tile = slice(start, start + ctx.rows)
            products = vectors[tile] @ codebook.T  # (n, K)
            soft = products.softmax(1)
            direct = of_quantized[tile] @ codebook.T
            of_products = soft * (direct - (soft * direct).sum(1, keepdim=True))
            if ctx.temperature:
                logs = (products / ctx.temperature).log_softmax(1)
                soft = logs.exp()
                # Entropy H has the gradient -p (log p + H); a function of the mean softmax passes p (g - p . g).
                entropy = -(soft * logs).sum(1, keepdim=True)
                inner = of_mean - (soft * of_mean).sum(1, keepdim=True) - of_entropy * (logs + entropy)
                of_products += soft * inner / (len(vectors) * ctx.temperature)
            of_vectors[tile] = of_products @ codebook
            of_codebook.addmm_(of_products.T, vectors[tile])
        return of_vectors, of_codebook, None, None


_KINDS: dict[str, type[ControlQuantizer]] = {
    "fsq": FiniteScalarQuantizer,
    "lfq": LookupFreeQuantizer,
    "simvq": SimVQ,
    "ibq": IndexBackpropagationQuantizer,
}


def build_quantizer(config: VectorQuantizerConfig, dim: int, *, seed: int = 0) -> VectorQuantizer | ControlQuantizer:
    """Build the quantizer that the settings name, for vectors with `dim` channels."""
    return _KINDS[config.kind](config, dim) if config.kind in _KINDS else VectorQuantizer(config, dim, seed=seed)
