"""What settings of the sampler are worth on the quickstart's model: guidance, contrastive decoding, infilling.

    python benchmarks/sampling_quality.py --quickstart runs/quickstart [--what guidance infilling]

Guidance: pictures for the captions of held-out pairs, and of as many pairs that were trained on, apart; the share whose
nearest demo picture, as the image tokenizer redraws it, is of the right concept (docs/guidance.png). Infilling: half of
each held-out picture is drawn anew (docs/infilling.png); the share where the drawn half is nearer to the true one than
the mean of all demo pictures is.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from curves import draw_curves
from record import record
from torch import Tensor

from mixmodal.evaluation.concepts import nearest_pictures, redraw
from mixmodal.evaluation.sheet import draw_captioned
from mixmodal.pipeline import MixedModal
from mixmodal.quickstart.demo import Demo, choose, load_demo
from mixmodal.quickstart.samples import judge
from mixmodal.tokenization.preprocessing import to_pictures, to_tensor

SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CONTRASTS = ((1, 0.1), (2, 0.1), (4, 0.1), (8, 0.1), (2, 0.5), (4, 0.5), (8, 0.5))

DOCS = Path(__file__).resolve().parents[1] / "docs"
NUM_SHOWN = 8
HALVES = ("lower", "upper", "right")
NUM = 4
"""Samples for each caption, of seeds of their own."""


def measure_guidance(model: MixedModal, demo: Demo, redrawn: Tensor) -> None:
    """Share of right concepts by scale and by k and alpha, as the default sampling draws them and greedily."""
    held_out = demo.indices(heldout=True)
    chosen = {"held-out": held_out, "trained": choose(demo.indices(heldout=False), len(held_out), seed=0)}
    settings: dict[str, dict[str, Any]] = {f"guidance {scale:g}": {"guidance_scale": scale} for scale in SCALES}
    for k, alpha in CONTRASTS:
        settings[f"CD-K, k {k}, alpha {alpha:g}"] = {"contrast_k": k, "contrast_alpha": alpha}
    curves: dict[str, dict[str, list[list[tuple[float, float]]]]] = {}
    for name, options in settings.items():
        for split, places in chosen.items():
            captions = [demo.labels[place].caption for place in places]
            samples = model.generate_batch(captions, "image", num=NUM, **options)
            for what, rate in rates(demo, redrawn, places, samples).items():
                shape = {"captions": len(places), "samples": NUM, **options}
                record("guidance", f"{name}: right {what}, {split} pairs", [rate], "", model_device(model), shape)
                along = "CD-K, by k" if "contrast_k" in options else "guidance, by its scale"
                arm = split if "contrast_k" not in options else f"{split}, alpha {options['contrast_alpha']:g}"
                (curve,) = curves.setdefault(f"right {what}: {along}", {}).setdefault(arm, [[]])
                curve.append((options.get("contrast_k", options.get("guidance_scale")), rate))
    draw_curves(curves, DOCS / "guidance.png", logarithmic=False)


def rates(demo: Demo, redrawn: Tensor, places: list[int], samples: list[list[Any]]) -> dict[str, float]:
    """Share of samples whose nearest demo picture is of the right concept, and of the right style."""
    owners = [place for place, row in zip(places, samples, strict=True) for _ in row]
    images = torch.stack([to_tensor(picture) for row in samples for picture in row])
    nearest = nearest_pictures(images, redrawn).indices.tolist()
    verdicts = [judge(demo.labels[own], demo.labels[place]) for own, place in zip(owners, nearest, strict=True)]
    return {what: float(np.mean([one[f"{what}_right"] for one in verdicts])) for what in ("concept", "style")}


def measure_infilling(model: MixedModal, demo: Demo, redrawn: Tensor) -> None:
    """Share of held-out pictures whose half is drawn nearer to the true one than the mean picture is."""
    places = demo.indices(heldout=True)
    mean, side = redrawn.mean(dim=0), redrawn.shape[-1]
    boxes = {"lower": (0, side // 2, side, side), "upper": (0, 0, side, side // 2), "right": (side // 2, 0, side, side)}
    for half in HALVES:
        left, top, right, bottom = boxes[half]
        for order in ("raster", "masks"):
            nearer, shown = [], []
            for place in places:
                (picture,) = to_pictures(demo.images[place][None])
                (drawn,) = model.infill(picture, boxes[half], demo.labels[place].caption, order=order)
                true = redrawn[place][:, top:bottom, left:right]
                errors = [
                    float((one[:, top:bottom, left:right] - true).square().mean()) for one in (to_tensor(drawn), mean)
                ]
                nearer.append(errors[0] < errors[1])
                known = picture.copy()
                known.paste((235, 235, 235), boxes[half])
                shown.append((demo.labels[place].caption, known, drawn))
            if (half, order) == (HALVES[0], "raster"):
                draw_captioned(*map(list, zip(*shown[:NUM_SHOWN]))).save(DOCS / "infilling.png", optimize=True)
            shape = {"pictures": len(places), "half": half, "order": order}
            name = f"{half} half, order {order}: nearer to the true half than the mean picture"
            record("infilling", name, [float(np.mean(nearer))], "", model_device(model), shape)


def model_device(model: MixedModal) -> str:
    """Where the network computes."""
    return model.model.embedding.weight.device.type


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--what", nargs="+", choices=("guidance", "infilling"), default=("guidance", "infilling"))
    given = parser.parse_args()
    loaded = MixedModal.from_pretrained(given.quickstart / "export")
    size = loaded.codec.image_tokenizer.config
    data = given.quickstart / "data"
    pictures = load_demo(data / "train", data / "heldout", size.image_size, size.preprocess)
    references = redraw(loaded.codec, pictures.images)
    if "guidance" in given.what:
        measure_guidance(loaded, pictures, references)
    if "infilling" in given.what:
        measure_infilling(loaded, pictures, references)
