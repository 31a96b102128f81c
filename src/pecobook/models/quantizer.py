"""The vector quantizer: nearest codeword, straight-through gradient, and a codebook that follows the data.

B batch, D codeword dimension, h w latent grid, N = B h w vectors, K codewords.

The codebook is learned by exponential moving averages (van den Oord et al., arXiv 1711.00937, appendix A.1), PeCo's
default. Every training `forward` remembers its vectors; `update`, called once an optimizer step, sums their statistics
over all ranks and moves the codebook. So accumulation steps and ranks change nothing but rounding (and, by the order of
the vectors, from which of them k-means starts), and a codebook is the same on every rank. Statistics, distances and
loss are in fp32 under any autocast.

With `learning="gradient"` the codebook is a parameter instead, and the middle term of equation 3 moves it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.models.nearest import nearest_codeword
from pecobook.settings.tokenizer import VectorQuantizerConfig
from pecobook.utils.distributed import gather_rows, world_size

_KMEANS_ITERATIONS = 10
_REVIVE_EVERY = 10  # updates between looks for dead codewords: each look costs one synchronisation with the device


class Quantized(NamedTuple):
    """What a quantizer returns."""

    quantized: Tensor
    """(B, D, h, w) codewords, with the gradient passed straight through to the input."""
    codes: Tensor
    """int64 (B, h, w), in [0, K)."""
    commitment_loss: Tensor
    """() mean over vectors and channels of ||sg[e] - z||^2, unweighted (equation 3's last term without beta)."""
    codebook_loss: Tensor
    """() the same number with its gradient to the codewords (equation 3's middle term); without any where the codebook
    follows averages."""


class VectorQuantizer(nn.Module):
    """K codewords of dimension D, learned by moving averages, or by gradient.

    The first training step starts the codebook with k-means over its vectors, gathered from all ranks. A codeword that
    no vector chose for `revive_after` updates is replaced by a vector of the current batch, and its statistics with
    it, since otherwise the next update would pull it straight back.

    Args:
        num_codewords: K; or all settings in one object.
        dim: D.
        seed: of the k-means start and of the choice of replacements; the same on all ranks.
        settings: further fields of `VectorQuantizerConfig`, by name. With `learning="gradient"` add `codebook_loss` to
            the loss, and give the module's parameter to the optimizer; counts then only tell what is used and what is
            dead.

    Raises:
        ConfigError: a setting out of its range.
    """

    codebook: Tensor  # (K, D)
    ema_count: Tensor  # (K,)
    ema_sum: Tensor  # (K, D)
    idle: Tensor  # int64 (K,), updates since last chosen or revived
    usage: Tensor  # (K,) moving average of the counts, which revival does not touch: what vectors really chose
    unused: Tensor  # int64 (K,), updates since really chosen
    num_updates: Tensor  # int64 ()
    num_revived: Tensor  # int64 ()

    def __init__(self, num_codewords: int | VectorQuantizerConfig, dim: int, *, seed: int = 0, **settings: Any) -> None:
        super().__init__()
        if not isinstance(num_codewords, VectorQuantizerConfig):
            num_codewords = VectorQuantizerConfig(num_codewords=num_codewords)
        self.config = dataclasses.replace(num_codewords, **settings)
        self.num_codewords, self.dim, self.seed = self.config.num_codewords, dim, seed
        start = torch.randn(self.num_codewords, dim) / dim**0.5
        if self.config.learning == "gradient":
            self.register_parameter("codebook", nn.Parameter(start))
        else:
            self.register_buffer("codebook", start)
        self.register_buffer("ema_count", torch.zeros(self.num_codewords))
        self.register_buffer("ema_sum", torch.zeros(self.num_codewords, dim))
        self.register_buffer("idle", torch.zeros(self.num_codewords, dtype=torch.int64))
        self.register_buffer("usage", torch.zeros(self.num_codewords))
        self.register_buffer("unused", torch.zeros(self.num_codewords, dtype=torch.int64))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("num_revived", torch.zeros((), dtype=torch.int64))
        # Python mirrors of what the buffers say, so that no step has to ask the device.
        self._started = self._warming = False
        self._steps = 0
        self._unquantised = self.config.start_after > 0  # `forward` reads no count: each step would be compiled anew
        self._start_rows = 0  # vectors that the start has seen, in the step that starts
        self._seen: tuple[Tensor, Tensor] | None = None  # vectors (N, D) and codes (N,) since the last update

    def forward(self, z: Tensor) -> Quantized:
        """Quantise z (B, D, h, w). In training mode, also collect statistics for the next `update`."""
        B, _, h, w = z.shape
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            if self.training and self._unquantised:
                self._warming = True
                # 0 x sum: every parameter takes part in every step, as DDP asks.
                nothing = 0.0 * self.codebook.sum() if self.codebook.requires_grad else z.new_zeros(())
                return Quantized(z, torch.zeros(B, h, w, dtype=torch.int64, device=z.device), z.new_zeros(()), nothing)
            vectors = z.permute(0, 2, 3, 1).reshape(-1, self.dim)  # (N, D)
            if self.training and not self._started:
                self._start(vectors.detach())
            codes = nearest_codeword(vectors, self.codebook, precision=self.config.precision)  # (N,)
            if self.training:
                self._remember(vectors.detach(), codes)
            quantized = self.lookup(codes.view(B, h, w))  # (B, D, h, w)
            commitment = F.mse_loss(z, quantized.detach())
            by_gradient = self.config.learning == "gradient"
            codebook_loss = F.mse_loss(quantized, z.detach()) if by_gradient else commitment.detach()
            # Straight-through: forward is the codeword, backward is the identity.
            quantized = z + (quantized - z).detach()
        return Quantized(quantized, codes.view(B, h, w), commitment, codebook_loss)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Codewords of z (B, D, h, w), without gradient or learning; z itself until the codebook is started."""
        if self.training and not self._started:
            return z.float()
        B, D, h, w = z.shape
        codes = nearest_codeword(z.permute(0, 2, 3, 1).reshape(-1, D), self.codebook, precision=self.config.precision)
        return self.lookup(codes.view(B, h, w))

    def lookup(self, codes: Tensor) -> Tensor:
        """Codewords of codes: int64 (B, h, w) to (B, D, h, w)."""
        return F.embedding(codes, self.codebook).permute(0, 3, 1, 2).contiguous()

    # ------------------------------------------------------------------------------------------ learning the codebook

    @torch.no_grad()
    def update(self) -> None:
        """Move the codebook by the vectors since the last call, on all ranks. Once an optimizer step."""
        own = self.config
        if self._warming:
            self._warming = False
            self.num_updates.add_(1)
            self._steps += 1
            self._unquantised = self._steps < own.start_after
        if self._seen is None:
            return
        vectors, codes = self._seen
        self._seen = None
        if 0 < self._start_rows < len(vectors):  # the start saw the first of several micro-batches: now it sees all
            self._start(vectors)
            codes = nearest_codeword(vectors, self.codebook, precision=own.precision)
        self._start_rows = 0
        # Never a one-hot matrix (N, K).
        counts = torch.zeros_like(self.ema_count).index_add_(0, codes, vectors.new_ones(len(codes)))
        sums = torch.zeros_like(self.ema_sum).index_add_(0, codes, vectors)
        if world_size() > 1:
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        self.ema_count.lerp_(counts, 1 - own.decay)
        self.ema_sum.lerp_(sums, 1 - own.decay)
        if own.learning == "ema":
            total = self.ema_count.sum()
            smoothed = (self.ema_count + own.eps) / (total + self.num_codewords * own.eps) * total  # (K,)
            # An unused codeword keeps its place: its sum and count fade alike, but smoothing would pull it to 0.
            used = (counts > 0)[:, None]
            self.codebook.copy_(torch.where(used, self.ema_sum / smoothed.clamp_min(1e-12)[:, None], self.codebook))
        self.usage.lerp_(counts, 1 - own.decay)
        for since in (self.idle, self.unused):
            since.add_(1).masked_fill_(counts > 0, 0)
        self.num_updates.add_(1)
        self._steps += 1
        if own.revive_after and self._steps % _REVIVE_EVERY == 0:
            self._revive(vectors)

    def _remember(self, vectors: Tensor, codes: Tensor) -> None:
        if self._seen is not None:
            vectors, codes = torch.cat([self._seen[0], vectors]), torch.cat([self._seen[1], codes])
        self._seen = vectors, codes

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # once in a training
    @torch.no_grad()
    def _start(self, vectors: Tensor) -> None:
        """Start the codebook by k-means over the vectors of all ranks."""
        pool = gather_rows(vectors)
        # 32 vectors a codeword tell where its centre is; more only cost time.
        stride = max(1, len(pool) // (32 * self.num_codewords))
        codebook, counts = kmeans(pool[::stride], self.num_codewords, seed=self.seed)
        if world_size() > 1:  # equal input gives equal output, but a codebook must not hang on that
            dist.broadcast(codebook, 0)
            dist.broadcast(counts, 0)
        # The averages begin as if the last batches had looked like this one.
        counts = counts * (len(pool) / counts.sum().clamp_min(1))
        self.codebook.copy_(codebook)
        self.ema_count.copy_(counts)
        self.ema_sum.copy_(codebook * counts[:, None])
        self._started, self._start_rows = True, len(vectors)

    def _revive(self, vectors: Tensor) -> None:
        """Replace dead codewords by vectors of this step."""
        dead = self.idle >= self.config.revive_after
        number = int(dead.sum())
        if number == 0:
            return
        # Every s-th vector, with s from the global count: two half batches offer what one whole batch offers.
        stride = max(1, len(vectors) * world_size() // self.num_codewords)
        pool = gather_rows(vectors[::stride])
        generator = torch.Generator().manual_seed(self.seed + 7919 * self._steps)
        chosen = torch.randint(len(pool), (number,), generator=generator)
        if number <= len(pool):  # without replacement where that is possible
            chosen = torch.randperm(len(pool), generator=generator)[:number]
        fresh = pool[chosen.to(pool.device)]
        mean_count = self.ema_count.sum() / self.num_codewords
        self.codebook[dead] = fresh
        self.ema_count[dead] = mean_count
        self.ema_sum[dead] = fresh * mean_count
        self.idle[dead] = 0
        self.num_revived.add_(number)

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._steps = int(self.num_updates)
        self._unquantised = self._steps < self.config.start_after
        self._started, self._start_rows = bool(self.ema_count.sum() > 0), 0
        self._seen = None


def kmeans(
    vectors: Tensor, num_clusters: int, *, seed: int, iterations: int = _KMEANS_ITERATIONS
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from randomly chosen vectors; an empty cluster restarts at a random vector.

    Args:
        vectors: (N, D). With fewer than `num_clusters`, vectors repeat, each copy moved by a little noise.
        num_clusters: K.
        seed: of the choice; equal input and seed give equal output.
        iterations: of assignment and mean.

    Returns:
        centres (K, D) and the number of vectors of each, float (K,).
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(vectors), generator=generator)
    if len(vectors) < num_clusters:
        extra = torch.randint(len(vectors), (num_clusters - len(vectors),), generator=generator)
        order = torch.cat([order, extra])
    centres = vectors[order[:num_clusters].to(vectors.device)].clone()
    if len(vectors) < num_clusters:
        noise = torch.randn(centres.shape, generator=generator).to(vectors)
        centres += 0.01 * vectors.std().nan_to_num(1.0) * noise
    counts = torch.zeros(num_clusters, device=vectors.device)
    for _ in range(iterations):
        codes = nearest_codeword(vectors, centres)
        counts = torch.bincount(codes, minlength=num_clusters).float()
        sums = torch.zeros_like(centres).index_add_(0, codes, vectors)
        empty = counts == 0
        centres = torch.where(empty[:, None], centres, sums / counts.clamp_min(1)[:, None])
        if len(vectors) >= num_clusters and bool(empty.any()):
            replacement = torch.randint(len(vectors), (int(empty.sum()),), generator=generator)
            centres[empty] = vectors[replacement.to(vectors.device)]
    return centres, counts
