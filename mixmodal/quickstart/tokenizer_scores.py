"""How well the image tokenizer redraws held-out pictures, and how much of its codebook all demo pictures use."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from mixmodal.evaluation.reconstruction import psnr, score_reconstructions
from mixmodal.quickstart.demo import Demo, choose, load_demo, save_picture
from mixmodal.quickstart.runner import write_json
from mixmodal.tokenization.image import ImageTokenizer
from mixmodal.tokenization.preprocessing import to_pictures

NUM_SHOWN = 48


def score_tokenizer(run: Path, folder: Path) -> None:
    """Writes `image_tokenizer/scores.json`, and originals with their reconstructions for the report.

    The share of codes used is that of all demo pictures: few held-out pictures have fewer codes than the codebook. What
    the held-out ones alone use stands beside it, with the share that as many equally likely codes would meet.
    """
    tokenizer = ImageTokenizer.load(folder)
    config = tokenizer.config
    demo = load_demo(run / "data" / "train", run / "data" / "heldout", config.image_size, config.preprocess)
    heldout = score_reconstructions(tokenizer, demo.images[demo.indices(heldout=True)].split(64))
    everything = score_reconstructions(tokenizer, demo.images.split(64))
    scores = {
        "psnr_heldout": heldout.psnr,
        "ssim_heldout": heldout.ssim,
        "codebook_usage": everything.codebook_usage,
        "codebook_usage_heldout": heldout.codebook_usage,
        "codebook_usage_heldout_if_uniform": heldout.expected_usage,
        "perplexity": everything.perplexity,
        "codebook_size": tokenizer.codebook_size,
        "num_codes": tokenizer.grid[0] * tokenizer.grid[1],
    }
    save_reconstructions(run, tokenizer, demo)
    write_json(run / "image_tokenizer" / "scores.json", scores)


def save_reconstructions(run: Path, tokenizer: ImageTokenizer, demo: Demo) -> None:
    """Held-out originals and what the tokenizer makes of them, as PNG files and a list for the report."""
    chosen = choose(demo.indices(heldout=True), NUM_SHOWN, seed=0)
    originals = demo.images[chosen]
    reconstructions: Tensor = tokenizer.decode(tokenizer.encode(originals))
    values = psnr(reconstructions, originals).tolist()
    pairs = zip(chosen, to_pictures(originals), to_pictures(reconstructions), values, strict=True)
    items = [
        {
            "original": save_picture(original, run, f"image_tokenizer/pictures/{index:05d}.png"),
            "reconstruction": save_picture(redrawn, run, f"image_tokenizer/pictures/{index:05d}_redrawn.png"),
            "caption": demo.labels[index].caption,
            "psnr": value,
        }
        for index, original, redrawn, value in pairs
    ]
    write_json(run / "image_tokenizer" / "reconstructions.json", items)
