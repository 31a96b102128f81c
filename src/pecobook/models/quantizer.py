"""The vector quantizer: nearest codeword, straight-through gradient, and a codebook learned from the data.

B batch, D codeword dimension, h w latent grid, N = B h w vectors, K codewords.

The codebook is learned by exponential moving averages (van den Oord et al., arXiv 1711.00937, appendix A.1), PeCo's
default. In training, every `forward` stores its vectors, which the next one reduces to sums and a sample; `update`,
called once per optimizer step, sums the statistics over all ranks and updates the codebook. The number of accumulation
steps and ranks therefore changes only rounding (and, through the order of the vectors, the initial centres of k-means),
and the codebook is the same on every rank. A step holds one micro-batch and at most 3 K vectors, and in the initial
step also those that k-means starts from. Statistics, distances and losses are computed in fp32 under any autocast.

With `kind="gradient"` the codebook is a parameter instead, trained by the middle term of equation 3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.models.accumulation import Sample, Weighted, merged
from pecobook.models.nearest import nearest_codeword
from pecobook.settings.tokenizer import VectorQuantizerConfig
from pecobook.settings.values import replace
from pecobook.utils.distributed import gather_rows, world_size
from pecobook.utils.vectors import unit_length

_KMEANS_ITERATIONS = 10
_START_VECTORS = 2**18  # number of vectors from which k-means starts a codebook of up to 65,536 codewords; 2 x at most
_TILE = 2**22  # number of elements of the sums that are computed at once; a codebook of 8,192 x 256 has half of it
_REVIVE_EVERY = 10  # updates between checks for dead codewords: each check costs one synchronisation with the device


class Quantized(NamedTuple):
    """Result of `VectorQuantizer.forward`."""

    quantized: Tensor
    """Codewords (B, D, h, w); the gradient passes straight through to the input."""
    codes: Tensor
    """Indices of the codewords, int64 (B, h, w), in [0, K)."""
    commitment_loss: Tensor
    """() mean over vectors and channels of ||sg[e] - z||^2, unweighted (last term of equation 3 without beta)."""
    codebook_loss: Tensor
    """() mean of ||e - sg[z]||^2 (middle term of equation 3), with gradient to the codewords, or without it if the
    codebook is learned by moving averages."""


class Quantizer(nn.Module):
    """The common part of all quantizers: codewords, usage counts, and initial steps without quantisation.

    Args:
        config: the settings.
        dim: D.
    """

    codebook: Tensor  # (K, D)
    usage: Tensor  # (K,) moving average of the counts
    unused: Tensor  # int64 (K,), updates since the codeword was last chosen
    num_updates: Tensor  # int64 ()
    num_revived: Tensor  # int64 ()

    def __init__(self, config: VectorQuantizerConfig, dim: int) -> None:
        super().__init__()
        self.config, self.num_codewords, self.dim = config, config.num_codewords, dim
        self.register_buffer("usage", torch.zeros(self.num_codewords))
        self.register_buffer("unused", torch.zeros(self.num_codewords, dtype=torch.int64))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("num_revived", torch.zeros((), dtype=torch.int64))
        # Python copies of the state in the buffers, so that no step has to wait for the device.
        self._steps = 0
        # Whether `forward` passes vectors unquantised. `forward` must not read a count, since torch.compile would then
        # recompile it at each step.
        self._bypass = config.start_after > 0
        self._bypassed = False  # whether a `forward` passed vectors unquantised since the last update

    def _unquantised(self, z: Tensor) -> Quantized:
        """Return z (B, D, h, w) unquantised."""
        self._bypassed = True
        # 0 x sum: every parameter must take part in every step, since DDP requires that.
        zero_loss = z.new_zeros(()) + sum(0.0 * parameter.sum() for parameter in self.parameters())
        codes = torch.zeros(len(z), *z.shape[2:], dtype=torch.int64, device=z.device)
        return Quantized(z, codes, z.new_zeros(()), zero_loss)

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the codewords of codes: int64 (B, h, w) to (B, D, h, w)."""
        return F.embedding(codes, self.codebook).permute(0, 3, 1, 2).contiguous()

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """Return the codes of z (B, D, h, w): int64 (B, h, w)."""
        B, D, h, w = z.shape
        return self._codes(z.float().permute(0, 2, 3, 1).reshape(-1, D)).view(B, h, w)

    def _codes(self, vectors: Tensor) -> Tensor:
        """Return the codes of vectors (N, D), int64 (N,)."""
        return nearest_codeword(vectors, self.codebook)

    def _next_step(self) -> None:
        self._bypassed = False
        self.num_updates.add_(1)
        self._steps += 1
        self._bypass = self._bypass and self._steps < self.config.start_after

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._steps = int(self.num_updates)
        self._bypass = self._steps < self.config.start_after


class VectorQuantizer(Quantizer):
    """K codewords of dimension D, learned by moving averages or by gradient.

    The first training step initialises the codebook by k-means over the vectors of all ranks. A codeword that no vector
    chose for `revive_after` updates is replaced by a vector of the current batch. Its statistics are replaced too;
    otherwise the next update would move it back.

    Args:
        num_codewords: K, or one object with all settings.
        dim: D.
        seed: seed of k-means and of the choice of replacements; must be the same on all ranks.
        settings: other fields of `VectorQuantizerConfig`, by name. With `kind="gradient"`, add `codebook_loss` to the
            loss and pass the module's parameter to the optimizer; the counts then only tell used codewords from dead
            ones.

    Raises:
        ConfigError: a setting is unknown, of the wrong type or out of range.
    """

    ema_count: Tensor  # (K,)
    ema_sum: Tensor  # (K, D)
    idle: Tensor  # int64 (K,), updates since the codeword was last chosen or revived
    # Revival changes ema_count and idle, but not usage and unused.
    _pending: tuple[Tensor, Tensor] | None  # vectors (N, D) and codes (N,) of the last micro-batch
    _folded: Weighted | None  # all earlier ones, merged
    _sample: Sample  # of all vectors of the step
    _num_start_vectors: int  # number of vectors that k-means sampled from in the initial step

    def __init__(self, num_codewords: int | VectorQuantizerConfig, dim: int, *, seed: int = 0, **settings: Any) -> None:
        if not isinstance(num_codewords, VectorQuantizerConfig):
            settings, num_codewords = {"num_codewords": num_codewords, **settings}, VectorQuantizerConfig()
        super().__init__(replace(num_codewords, settings), dim)
        self.seed = seed
        codebook = torch.randn(self.num_codewords, dim) / dim**0.5
        if self.config.kind == "gradient":
            self.register_parameter("codebook", nn.Parameter(codebook))
        else:
            self.register_buffer("codebook", codebook)
        self.register_buffer("ema_count", torch.zeros(self.num_codewords))
        self.register_buffer("ema_sum", torch.zeros(self.num_codewords, dim))
        self.register_buffer("idle", torch.zeros(self.num_codewords, dtype=torch.int64))
        self._initialised = False  # whether k-means has run
        self._forget()

    @property
    def starts_now(self) -> bool:
        """Whether the next `forward` in training mode initialises the codebook."""
        return self.training and not self._bypass and not self._initialised

    @torch.no_grad()
    def start(self, z: Tensor) -> None:
        """Initialise the codebook by k-means over z (N, D, h, w), the encoder's output for all images of this rank.

        Without it, k-means uses the vectors of the first `forward`, so under gradient accumulation the first
        micro-batch would determine the codewords that the losses of the first step see.
        """
        self._start_from(self._on_sphere(z.float().permute(0, 2, 3, 1).reshape(-1, self.dim)))

    def forward(self, z: Tensor) -> Quantized:
        """Quantise z (B, D, h, w). In training mode, also store the vectors for the next `update`."""
        B, _, h, w = z.shape
        with torch.autocast(z.device.type, enabled=False):
            z = unit_length(z.float()) if self.config.normalise else z.float()
            if self.training and self._bypass:
                return self._unquantised(z)
            vectors = z.permute(0, 2, 3, 1).reshape(-1, self.dim)  # (N, D)
            if self.training and not self._initialised:
                self._start_from(vectors.detach())
            codes = nearest_codeword(vectors, self.codebook, precision=self.config.precision)  # (N,)
            if self.training:
                if self._pending is not None:
                    self._fold(is_last=False)
                self._pending = vectors.detach(), codes
            quantized = self.lookup(codes.view(B, h, w))  # (B, D, h, w)
            commitment_loss = F.mse_loss(z, quantized.detach())
            codebook_loss = commitment_loss.detach()
            if self.config.kind == "gradient":
                codebook_loss = F.mse_loss(quantized, z.detach())
            # Straight-through: the forward value is the codeword, the backward pass is the identity.
            quantized = z + (quantized - z).detach()
        return Quantized(quantized, codes.view(B, h, w), commitment_loss, codebook_loss)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Return the codewords nearest to z (B, D, h, w), without gradient or learning.

        In training mode, returns z itself until the codebook is initialised.
        """
        if self.training and not self._initialised:
            return z.float()
        B, D, h, w = z.shape
        codes = nearest_codeword(z.permute(0, 2, 3, 1).reshape(-1, D), self.codebook, precision=self.config.precision)
        return self.lookup(codes.view(B, h, w))

    # ------------------------------------------------------------------------------------------ learning the codebook

    @torch.no_grad()
    def update(self) -> None:
        """Update the codebook with the vectors of all ranks since the last call. Call it once per optimizer step."""
        config = self.config
        if self._bypassed:
            self._next_step()
        if self._pending is None:
            return
        self._fold(is_last=True)
        step = self._of_start() if self._num_start_vectors else self._folded
        assert step is not None
        # Counts by index_add, without a one-hot matrix (N, K).
        counts = torch.zeros_like(self.ema_count).index_add_(0, step.codes, step.counts)
        if world_size() > 1:
            dist.all_reduce(counts)
        self.ema_count.lerp_(counts, 1 - config.decay)
        self._update_codewords(step, counts)
        self.usage.lerp_(counts, 1 - config.decay)
        for updates in (self.idle, self.unused):
            updates.add_(1).masked_fill_(counts > 0, 0)
        self._next_step()
        if config.revive_after and self._steps % _REVIVE_EVERY == 0:
            self._revive()
        self._forget()

    def _update_codewords(self, step: Weighted, counts: Tensor) -> None:
        """Update the sums, and with moving averages also the codewords, a few thousand codewords at a time.

        This avoids temporary copies of all (K, D) numbers of a large codebook. The result does not depend on the tiles:
        the vectors of a codeword are added in order.
        """
        config, K = self.config, self.num_codewords
        total = self.ema_count.sum()
        smoothed = (self.ema_count + config.eps) / (total + K * config.eps) * total  # (K,)
        rows = max(_TILE // self.dim, 1)
        for start in range(0, K, rows):
            tile = slice(start, start + rows)
            inside, place = step.sums, step.codes
            if rows < K:
                mine = (place >= start) & (place < start + rows)
                inside, place = inside[mine], place[mine] - start
            sums = torch.zeros_like(self.ema_sum[tile]).index_add_(0, place, inside)
            if world_size() > 1:
                dist.all_reduce(sums)
            self.ema_sum[tile].lerp_(sums, 1 - config.decay)
            codewords = self.codebook[tile]
            if config.kind == "gradient":
                if config.normalise:
                    codewords.copy_(self._on_sphere(codewords))
            else:
                # An unused codeword does not move: its sum and count decay alike, but smoothing would pull it to 0.
                used = (counts[tile] > 0)[:, None]
                means = self._on_sphere(self.ema_sum[tile] / smoothed[tile].clamp_min(1e-12)[:, None])
                codewords.copy_(torch.where(used, means, codewords))

    def _on_sphere(self, rows: Tensor) -> Tensor:
        """Return vectors (N, D) scaled to unit length if the settings say so, otherwise unchanged."""
        return F.normalize(rows, dim=1) if self.config.normalise else rows

    def _forget(self) -> None:
        """Forget the vectors of a step."""
        self._pending = self._folded = None
        self._sample, self._num_start_vectors = Sample(self.num_codewords), 0

    # torch.compile makes no graph of it: the number of vectors that the sample has seen changes with every micro-batch.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _fold(self, *, is_last: bool) -> None:
        """Add the vectors of a micro-batch, possibly the last, to what the step keeps."""
        assert self._pending is not None
        (vectors, codes), self._pending = self._pending, None
        new = Weighted(vectors, codes, vectors.new_ones(len(codes)))
        parts = [new] if self._folded is None else [self._folded, new]
        is_only = is_last and len(parts) == 1  # its sums would waste memory
        self._folded = new if is_only else merged(parts, self.num_codewords)
        self._sample.add(vectors)
        if not is_last:  # a view would keep all vectors in memory
            self._sample.rows = self._sample.rows.clone()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # runs once in a training
    @torch.no_grad()
    def _start_from(self, vectors: Tensor) -> None:
        """Initialise the codebook from vectors (N, D) of this rank."""
        # 32 vectors for each codeword, or 4 of a large codebook, determine the centres well enough; more vectors only
        # cost time and memory.
        sample = Sample(min(32 * self.num_codewords, max(_START_VECTORS, 4 * self.num_codewords)))
        sample.add(vectors)
        self._sample = Sample(sample.size)
        self._initialise_codebook(sample)

    def _of_start(self) -> Weighted | None:
        """Return what the initial step adds to the averages: a sample, weighted to stand for all its vectors."""
        if self._num_start_vectors < self._sample.seen:  # k-means used only the first of several micro-batches
            self._initialise_codebook(self._sample)
        elif self._sample.stride == 1:
            return self._folded
        vectors, weight = self._sample.rows, self._sample.seen / len(self._sample.rows)
        codes = nearest_codeword(vectors, self.codebook, precision=self.config.precision)
        return Weighted(weight * vectors, codes, vectors.new_full((len(codes),), weight))

    def _initialise_codebook(self, sample: Sample) -> None:
        """Initialise the codebook by k-means over the samples of all ranks."""
        codebook, counts = kmeans(gather_rows(sample.rows), self.num_codewords, seed=self.seed)
        codebook = self._on_sphere(codebook)
        if world_size() > 1:  # equal input should give equal output, but the codebooks must not depend on that
            dist.broadcast(codebook, 0)
            dist.broadcast(counts, 0)
        # The averages start as if the previous batches had been like this batch.
        counts = counts * (sample.seen * world_size() / counts.sum().clamp_min(1))
        self.codebook.copy_(codebook)
        self.ema_count.copy_(counts)
        self.ema_sum.copy_(codebook * counts[:, None])
        self._initialised, self._num_start_vectors = True, sample.seen

    def _revive(self) -> None:
        """Replace dead codewords by vectors of this step, from the samples of all ranks."""
        dead = self.idle >= self.config.revive_after
        num_dead = int(dead.sum())
        if num_dead == 0:
            return
        sample = Sample(self.num_codewords)
        sample.add(self._sample.rows)  # that of the start is larger
        pool = gather_rows(sample.rows)
        generator = torch.Generator().manual_seed(self.seed + 7919 * self._steps)
        if num_dead > len(pool):
            # No vector revives two codewords, which would be copies: one of them would never be chosen. The codewords
            # that were idle longest come first, and the others wait for the vectors of a later step.
            num_dead = len(pool)
            longest = self.idle.argsort(descending=True, stable=True)[:num_dead]  # equal on all ranks
            dead = torch.zeros_like(dead).index_fill_(0, longest, True)
        torch.randint(len(pool), (num_dead,), generator=generator)  # so that each seed still gives the same choices
        choice = torch.randperm(len(pool), generator=generator)[:num_dead]
        replacements = pool[choice.to(pool.device)]
        mean_count = self.ema_count.sum() / self.num_codewords
        self.codebook[dead] = replacements
        self.ema_count[dead] = mean_count
        self.ema_sum[dead] = replacements * mean_count
        self.idle[dead] = 0
        self.num_revived.add_(num_dead)

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._initialised = bool(self.ema_count.sum() > 0)
        self._bypass = self._bypass and not self._initialised
        self._forget()


def kmeans(
    vectors: Tensor, num_clusters: int, *, seed: int, iterations: int = _KMEANS_ITERATIONS
) -> tuple[Tensor, Tensor]:
    """Run Lloyd's algorithm from randomly chosen vectors; an empty cluster restarts at a random vector.

    Args:
        vectors: (N, D). If there are fewer than `num_clusters`, some are repeated and a little noise is added.
        num_clusters: K.
        seed: seed of the random choices; equal inputs and seeds give equal outputs.
        iterations: number of assignment and averaging iterations.

    Returns:
        centres (K, D) and the number of vectors in each cluster, float (K,).
    """
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randperm(len(vectors), generator=generator)
    if len(vectors) < num_clusters:
        repeats = torch.randint(len(vectors), (num_clusters - len(vectors),), generator=generator)
        choice = torch.cat([choice, repeats])
    centres = vectors[choice[:num_clusters].to(vectors.device)].clone()
    if len(vectors) < num_clusters:
        noise = torch.randn(centres.shape, generator=generator).to(vectors)
        centres += 0.01 * vectors.std().nan_to_num(1.0) * noise
    counts = torch.zeros(num_clusters, device=vectors.device)
    before: Tensor | None = None
    for _ in range(iterations):
        codes = nearest_codeword(vectors, centres)
        if before is not None and torch.equal(codes, before):
            break  # further iterations would compute the same
        before = codes
        counts = torch.bincount(codes, minlength=num_clusters).float()
        sums = torch.zeros_like(centres).index_add_(0, codes, vectors)
        empty = counts == 0
        centres = torch.where(empty[:, None], centres, sums / counts.clamp_min(1)[:, None])
        if len(vectors) >= num_clusters and bool(empty.any()):
            replacement = torch.randint(len(vectors), (int(empty.sum()),), generator=generator)
            centres[empty] = vectors[replacement.to(vectors.device)]
            before = None
    return centres, counts
