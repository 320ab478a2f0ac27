"""What a prompt leaves open for the output `infill`: masks in its texts, or a region of its last picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL.Image import Image as Picture

from mixmodal.document import Mask
from mixmodal.pipeline.infilling import Order, Region
from mixmodal.tokenization.codec import Content


@dataclass(frozen=True)
class PartialPicture:
    """A picture of which a region is drawn anew."""

    picture: Picture
    region: Region


class Holes(NamedTuple):
    """The holes of a prompt.

    Args:
        masks: the number of each mask in its texts.
        regions: places, among its parts, of the pictures that have a region.
        num_parts: how many parts there are.
    """

    masks: Sequence[int]
    regions: Sequence[int]
    num_parts: int

    @classmethod
    def of(cls, parts: Sequence[Content | PartialPicture]) -> Holes:
        """Those of the parts of a prompt."""
        masks = [part.index for part in parts if isinstance(part, Mask)]
        return cls(masks, [place for place, part in enumerate(parts) if isinstance(part, PartialPicture)], len(parts))

    def check_none(self, output: str) -> None:
        """Whether an output that fills no holes can be drawn.

        Raises:
            ValueError: where there are some.
        """
        if self.masks or self.regions:
            hole = f"mask {self.masks[0]}" if self.masks else f"the region of part {self.regions[0]}"
            raise ValueError(f"{hole} can not be filled by the output {output}; take the output infill")

    def check(self, *, order: Order, is_guided: bool, reads: bool) -> None:
        """Whether the output `infill` can fill them.

        Args:
            order: of the codes of a region.
            is_guided: whether guidance is asked for.
            reads: whether documents are read before the prompt.

        Raises:
            ValueError: where there are none, or some that do not go together, or for what can not act on them.
        """
        if not self.masks and not self.regions:
            raise ValueError("there is no hole for the output infill: give a mask, or an image with a box or region")
        if self.masks and self.regions:
            raise ValueError("there are masks in texts and a region of a picture; give them in prompts of their own")
        for place, mask in enumerate(self.masks):
            if mask in self.masks[:place]:
                raise ValueError(f"mask {mask} stands there twice; give each another number")
        if len(self.regions) > 1:
            first, second = self.regions[:2]
            raise ValueError(f"parts {first} and {second} are both pictures with a region; one can be drawn anew")
        if self.regions and self.regions[0] != self.num_parts - 1:
            raise ValueError(f"part {self.regions[0]} is a picture with a region, which must be the last part")
        if self.masks and is_guided:
            raise ValueError("guidance acts on pictures alone; leave it out for masks in texts")
        if self.masks and order != "raster":
            raise ValueError(f"order {order} acts on regions of pictures alone; leave it out for masks in texts")
        if self.masks and reads:
            raise ValueError("no documents are read before masks in texts; leave memory and retrieve out")
