"""Boxes of objects, from the pixels of a picture's file to those of the square that is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmodal.data.corpus_files import read_picture
from mixmodal.data.skipping import SampleError, SampleLimits, SkipCounter
from mixmodal.data.tasks import OBJECTS, sides_of
from mixmodal.tokenization.preprocessing import PictureError, place_cropped, place_padded


@dataclass(frozen=True, kw_only=True)
class BoxMover:
    """Moves the boxes of a record as its picture is moved: cropped where it is an answer, padded where it is none.

    Args:
        folder: of the pictures.
        image_size: side of the square, pixels.
        counter: takes the objects of which nothing is left.
        limits: of pictures.
    """

    folder: Path
    image_size: int
    counter: SkipCounter
    limits: SampleLimits

    def move(self, objects: Any, pictures: Mapping[str, bool], source: str) -> Any:
        """The objects of a record with their boxes in the square, clipped; without those that lie outside.

        Args:
            objects: as `spell_objects` takes them; what is no list of them it names.
            pictures: names of the files, and whether each is an answer, or of a document without turns.
            source: names file, line and key.

        Raises:
            SampleError: for a broken box or picture, where nothing is left of all objects, and for other than one
                picture, since then nothing says whose the boxes are.
        """
        if not isinstance(objects, list) or not all(isinstance(one, dict) for one in objects):
            return objects
        if len(pictures) != 1:
            raise SampleError("broken box", f"{source}: boxes of one of {len(pictures)} pictures can not be moved")
        ((name, is_answer),) = pictures.items()
        try:
            size = read_picture(self.folder, name, source).open(self.limits.max_pixels).size
        except PictureError as error:
            raise SampleError("broken picture", str(error)) from error
        target = (self.image_size, self.image_size)
        placing = (place_cropped if is_answer else place_padded)(size, target)
        found: list[dict[str, Any]] = []
        for number, one in enumerate(objects, start=1):
            sides = sides_of(one.get("box"), f"{source}: {OBJECTS}, object {number}")
            moved = placing.move(sides, target)
            if moved is None or round(moved[0]) == round(moved[2]) or round(moved[1]) == round(moved[3]):
                self.counter.alter("object outside", f"{source}: nothing of object {number} is in the square")
            else:
                found.append({**one, "box": list(moved)})
        if objects and not found:
            raise SampleError("broken box", f"{source}: nothing of any object is in the square that is trained on")
        return found
