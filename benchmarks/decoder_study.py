"""What the codes keep, and what the decoder has learned to draw: a second decoder on frozen codes.

    python -m benchmarks.decoder_study runs/study/MoCo-v3-220-0 runs/study/pixel-220-0 --data photos

A perceptual loss changes two things at once: which codes an image gets, and how the decoder draws them. For each
codebook this script freezes encoder and codewords, trains a new decoder of the same shape under the pixel loss alone,
and prints PSNR and SSIM of both decoders on held-out images. If the second decoder draws what the first does not, the
codes have kept it.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from pecobook.analysis.reconstruction import decode_all, encode_all, psnr, ssim
from pecobook.data.images import open_images
from pecobook.data.sampler import key
from pecobook.data.source import ImageSource
from pecobook.data.stream import read_all
from pecobook.data.views import random_crop
from pecobook.models.tokenizer import PerceptualTokenizer, build_autoencoder
from pecobook.utils.images import to_float


def crops(source: ImageSource, size: int, *, views: int, seed: int) -> Tensor:
    """Return `views` random crops of each image, uint8 (views x N, 3, size, size)."""
    images = [source.read(index) for index in range(len(source))]
    keys = ((image, key(seed, view, index)) for view in range(views) for index, image in enumerate(images))
    return torch.stack([random_crop(image, size, crop_key, min_area=0.5) for image, crop_key in keys])


def train_decoder(tokenizer: PerceptualTokenizer, images: Tensor, arguments: argparse.Namespace) -> None:
    """Replace the tokenizer's decoder by a new decoder, trained on the codes of `images`, uint8 (N, 3, S, S)."""
    torch.manual_seed(arguments.seed)
    tokenizer.decoder = build_autoencoder(tokenizer.config.model)[1]
    codes = torch.cat([encode_all(tokenizer, to_float(part)) for part in torch.split(images, 1024)])
    optimizer = torch.optim.Adam(tokenizer.decoder.parameters(), lr=arguments.lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.lr, arguments.steps, pct_start=0.05)
    tokenizer.decoder.train()
    for _ in range(arguments.steps):
        rows = torch.randint(len(images), (arguments.batch_size,))
        restored = tokenizer.decode_latents(tokenizer.quantizer.lookup(codes[rows]))
        loss = F.mse_loss(restored, to_float(images[rows]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    tokenizer.decoder.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codebooks", nargs="+", help="runs of pecobook codebook")
    parser.add_argument("--data", default="photos")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--views", type=int, default=4, help="random crops of each training image")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    splits = open_images(arguments.data)
    print("| codebook | PSNR, dB: own decoder | second decoder | SSIM: own decoder | second decoder |")
    print("|---|---|---|---|---|")
    for run in arguments.codebooks:
        tokenizer = PerceptualTokenizer.from_pretrained(run)
        images = to_float(read_all(splits.evaluation, tokenizer.image_size)[0])
        codes, restored = encode_all(tokenizer, images), []
        for second in (False, True):
            if second:
                views = crops(splits.train, tokenizer.image_size, views=arguments.views, seed=arguments.seed)
                tokenizer.requires_grad_(True)
                train_decoder(tokenizer, views, arguments)
            restored.append(decode_all(tokenizer, codes))
        cells = [f"{float(metric(images, each).mean()):.2f}" for metric in (psnr, ssim) for each in restored]
        print(f"| {run} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
