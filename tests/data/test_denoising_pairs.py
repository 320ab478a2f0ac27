"""Pictures and what a denoiser is told of them, as shards hold them."""

import io
from pathlib import Path

from PIL import Image as PIL

from mixmodal.data.denoising import build_reader
from mixmodal.data.shards import PictureFile, Sample, write_shards
from mixmodal.data.skipping import SampleLimits, SkipCounter
from mixmodal.tokenization.conditions import ClassNames


def test_a_label_of_null_is_none_given_and_the_text_tells_the_class(tmp_path: Path) -> None:
    data = io.BytesIO()
    PIL.new("RGB", (4, 4)).save(data, "png")
    samples = [Sample(f"{n}", ("red", PictureFile(data.getvalue(), "png", "0.png")), {"label": None}) for n in range(2)]
    write_shards(iter(samples), tmp_path / "shards")
    read = build_reader(ClassNames([("red",), ("None",)]))
    found = list(read([tmp_path / "shards"], SkipCounter(0.0), SampleLimits()))
    assert [label for _, label in found] == ["red", "red"]
