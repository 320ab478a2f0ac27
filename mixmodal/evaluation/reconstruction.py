"""How well an image tokenizer gives pictures back, and how much of its codebook it uses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mixmodal.data.pictures import decode_all, to_images
from mixmodal.data.skipping import SampleLimits
from mixmodal.tokenization.image import ImageTokenizer

MAX_PSNR = 100.0
"""dB; what a picture counts that comes back to the bit, whose PSNR has no bound."""


@dataclass(frozen=True, kw_only=True)
class ReconstructionScores:
    """Scores over a set of pictures.

    Args:
        num_pictures: pictures scored.
        psnr: dB, mean over pictures of the PSNR of each, on pixels in [0, 1].
        ssim: mean over pictures, -1 .. 1 (Wang et al. 2004, Gaussian window of 11 pixels).
        num_codes: codes drawn, pictures times the grid.
        codebook_usage: share of the codebook that was drawn at least once.
        expected_usage: the share that so many draws would reach if all codes were equally likely.
        perplexity: exp of the entropy of the codes: the number of equally likely codes that would be as uncertain.
    """

    num_pictures: int
    psnr: float
    ssim: float
    num_codes: int
    codebook_usage: float
    expected_usage: float
    perplexity: float


def psnr(reconstructions: Tensor, images: Tensor) -> Tensor:
    """PSNR of each picture in dB, `(B,)`; both inputs `(B, 3, H, W)` in [-1, 1]."""
    errors = ((reconstructions.float() - images.float()) / 2).square().flatten(1).mean(-1)
    return -10 * errors.clamp_min(10 ** (-MAX_PSNR / 10)).log10()


def ssim(reconstructions: Tensor, images: Tensor) -> Tensor:
    """SSIM of each picture, `(B,)`; both inputs `(B, 3, H, W)` in [-1, 1]."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    found, wanted = (reconstructions.float() + 1) / 2, (images.float() + 1) / 2
    values = structural_similarity_index_measure(found, wanted, data_range=1.0, reduction="none")
    return torch.as_tensor(values).reshape(len(images))


def codebook_usage(counts: Tensor) -> float:
    """Share of codes that occur; `counts` is `(codebook_size,)`, how often each does."""
    return float((counts > 0).double().mean())


def perplexity(counts: Tensor) -> float:
    """exp of the entropy, in nats, of codes that occur `counts` times."""
    shares = counts[counts > 0].double() / counts.sum()
    return math.exp(float(-(shares * shares.log()).sum()))


def expected_usage(num_codes: int, codebook_size: int) -> float:
    """Expected share of `codebook_size` equally likely codes that `num_codes` draws meet."""
    return 1 - (1 - 1 / codebook_size) ** num_codes if codebook_size > 1 else 1.0


@torch.no_grad()
def score_reconstructions(tokenizer: ImageTokenizer, batches: Iterable[Tensor]) -> ReconstructionScores:
    """Scores over batches of images `(B, 3, H, W)` in [-1, 1], on the device of the tokenizer.

    Raises:
        ValueError: where there are no pictures.
    """
    device = next(tokenizer.parameters()).device
    counts = torch.zeros(tokenizer.codebook_size, dtype=torch.int64, device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    num_pictures = 0
    for images in batches:
        images = images.to(device)
        codes = tokenizer.encode(images)
        reconstructions = tokenizer.decode(codes)
        counts.index_add_(0, codes.flatten(), torch.ones_like(codes.flatten()))
        sums += torch.stack([psnr(reconstructions, images).sum(), ssim(reconstructions, images).sum()]).double()
        num_pictures += len(images)
    if not num_pictures:
        raise ValueError("there are no pictures to score")
    counts = counts.cpu()
    num_codes = int(counts.sum())
    return ReconstructionScores(
        num_pictures=num_pictures,
        psnr=float(sums[0]) / num_pictures,
        ssim=float(sums[1]) / num_pictures,
        num_codes=num_codes,
        codebook_usage=codebook_usage(counts),
        expected_usage=expected_usage(num_codes, tokenizer.codebook_size),
        perplexity=perplexity(counts),
    )


@dataclass(frozen=True, kw_only=True)
class ImageTokenizerEvaluationConfig:
    """Which tokenizer to score on which pictures.

    Args:
        image_tokenizer: folder of the tokenizer.
        data: folders of shards; held-out ones for a score of generalisation.
        max_pictures: so many pictures, from the first, are scored.
        batch_size: pictures that are coded at a time.
        device: where to compute, `cpu` or `cuda`.
        out: JSON file for the scores; they are printed, too.
        limits: what a picture may be, and the share of bad ones that fails the job.
    """

    image_tokenizer: Path
    data: tuple[Path, ...]
    max_pictures: int = 5000
    batch_size: int = 64
    device: str = "cpu"
    out: Path | None = None
    limits: SampleLimits = field(default_factory=SampleLimits)

    def __post_init__(self) -> None:
        for name in ("max_pictures", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def evaluate_image_tokenizer(config: ImageTokenizerEvaluationConfig) -> ReconstructionScores:
    """Score a saved tokenizer on shards; prints the scores and writes them to `config.out`.

    Raises:
        ValueError: naming folder or file, where the tokenizer or the pictures can not be read.
    """
    tokenizer = ImageTokenizer.load(config.image_tokenizer).to(config.device)
    image_size, preprocess = tokenizer.config.image_size, tokenizer.config.preprocess
    _, pixels, _ = decode_all(config.data, image_size, config.limits, config.max_pictures, preprocess)
    scores = score_reconstructions(tokenizer, (to_images(part) for part in pixels.split(config.batch_size)))
    for name, value in asdict(scores).items():
        print(f"{name:>15}  {value:,.4g}" if isinstance(value, float) else f"{name:>15}  {value:,}")
    if config.out:
        source = {"image_tokenizer_sha256": ImageTokenizer.sha256(config.image_tokenizer)}
        record = {**asdict(scores), **source, "data": [str(path) for path in config.data]}
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return scores
