"""What is drawn into a document: a region of a picture, or texts that masks stand for.

CM3 (arXiv 2201.07520, section 2) reads what stands before and behind: masks in the document, and behind it each mask
once more, where the model writes what it stands for. Without it a region can only be drawn in the order of the codes,
below and behind what is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, cast

import numpy as np
from PIL import Image as Pictures
from PIL.Image import Image as Picture
from typing_extensions import Unpack

from mixmodal.document import Image, Run, SequenceFormat
from mixmodal.pipeline.drawing import Piece, Plan, show_partly
from mixmodal.pipeline.masked_text import FilledText, MaskedText
from mixmodal.pipeline.options import SamplingOptions, build_sampling, is_guided, refuse_size
from mixmodal.pipeline.prompts import Before
from mixmodal.sampling.engine import FREE, Progress, Request
from mixmodal.sampling.generator import SequenceGenerator
from mixmodal.tokenization.codec import Codec, Content
from mixmodal.tokenization.image import ImageTokenizerConfig
from mixmodal.tokenization.preprocessing import resize_and_crop

Region = Picture | tuple[int, int, int, int]
"""What is drawn anew: the white of a picture of the same size, or a box of pixels `(left, top, right, bottom)`."""
Order = Literal["masks", "raster"]
HALF = 128


def check_region(region: Region, size: tuple[int, int]) -> None:
    """Whether a region lies in a picture of a size, width and height.

    Raises:
        ValueError: for a mask of another size, or a box that leaves the picture.
    """
    if isinstance(region, Picture):
        if region.size != size:
            raise ValueError(f"the mask has {region.size[0]}x{region.size[1]} pixels, the picture {size[0]}x{size[1]}")
        return
    left, top, right, bottom = region
    if not (0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]):
        raise ValueError(f"the box {tuple(region)} does not lie in the picture of {size[0]}x{size[1]} pixels")


def cells_of(region: Region, size: tuple[int, int], config: ImageTokenizerConfig, grid: tuple[int, ...]) -> np.ndarray:
    """The codes that a region touches, bool `(h, w)`.

    Args:
        region: see there.
        size: width and height of the picture.
        config: of the image tokenizer, which resizes and crops both alike.
        grid: of its codes.

    Raises:
        ValueError: for a mask of another size, a box that leaves the picture, or a region that touches nothing.
    """
    check_region(region, size)
    if isinstance(region, Picture):
        mask = region.convert("L").point([255 * (level >= HALF) for level in range(256)])
    else:
        left, top, right, bottom = region
        mask = Pictures.new("L", size)
        mask.paste(255, (left, top, right, bottom))
    mask = resize_and_crop(mask, config.size_of(grid), config.preprocess)
    height, width = grid
    levels = np.asarray(mask).reshape(height, mask.height // height, width, mask.width // width)
    cells = levels.max(axis=(1, 3)) >= HALF
    if not cells.any():
        raise ValueError("the region touches no code of the picture; draw a larger one")
    return cells


def fill_region(
    format: SequenceFormat, requests: Sequence[Request], image: Image, cells: np.ndarray, order: Order
) -> list[Request]:
    """Requests for a picture behind a prompt, made into requests for a region of a known one.

    Args:
        image: the known codes `(h, w)`; those of the region are not read.
        cells: of the region, bool `(h, w)`.
        order: `masks` is CM3's, one for each stretch of codes in raster order; `raster` gives the known codes in turn,
            as far as the region goes.

    Raises:
        ValueError: where the region has more stretches than the vocabulary masks.
    """
    ids = format.vocabulary.to_ids("image", image.codes.reshape(-1))
    ids = format.lay_out(Run("image", ids, image.codes.shape))
    free = np.asarray(format.vocabulary.contains("image", ids))
    free[free] = cells.reshape(-1)
    if order == "raster":
        known = np.where(free, FREE, ids)[: np.flatnonzero(free)[-1] + 1]  # nothing is drawn behind the region
        return [_with_known(request, known, np.zeros(0, np.int64)) for request in requests]
    rows = [row for request in requests for row in request.rows]
    first = max(int(np.count_nonzero(format.vocabulary.contains("sentinel", row))) for row in rows)
    body, known = mask_stretches(format, ids, free, first)
    return [_with_known(request, known, body) for request in requests]


def mask_stretches(
    format: SequenceFormat, ids: np.ndarray, free: np.ndarray, first: int
) -> tuple[np.ndarray, np.ndarray]:
    """Codes with a mask for each stretch that is `free`, and the first mask again; then what the model writes.

    What it writes has the stretches, `FREE`, each but the last followed by `<eoss>` and the next mask.

    Args:
        first: index of the first mask: those before it stand in the prompt.
    """
    vocabulary = format.vocabulary
    edges = np.flatnonzero(np.diff(np.concatenate([[False], free, [False]]).astype(np.int8)))
    stretches = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
    most = vocabulary.config.num_sentinels - first
    if len(stretches) > most:
        raise ValueError(
            f"the region has {len(stretches)} stretches of codes, and the model {most} masks: fill a box of fewer "
            "rows, or fill it in the order raster"
        )
    masks = [vocabulary.sentinel(first + number) for number in range(len(stretches))]
    body, known, last = [], [], 0
    close = [] if format.blocks["image"].close_id is None else [format.blocks["image"].close_id]
    for number, (start, stop) in enumerate(stretches):
        body += [ids[last:start], [masks[number]]]
        known += [[vocabulary.end_of_span, masks[number]]] if number else []
        known.append(np.full(stop - start, FREE))
        last = stop
    body += [ids[last:], close, [masks[0]]]
    return np.concatenate(body).astype(np.int64), np.concatenate(known).astype(np.int64)


def _with_known(request: Request, known: np.ndarray, body: np.ndarray) -> Request:
    streams = tuple(one._replace(prompt=np.concatenate([one.prompt, body])) for one in request.streams)
    prompt = np.concatenate([request.prompt, body])
    return request._replace(prompt=prompt, streams=streams, known=known, room=len(known))


def merge_region(format: SequenceFormat, image: Image, cells: np.ndarray, request: Request, drawn: np.ndarray) -> Image:
    """The known codes with those of the region that were `drawn` for `request`; what is not yet drawn is as it was."""
    places = np.flatnonzero(cells)
    new = _region_ids(request, drawn)
    codes = image.codes.copy()
    codes.reshape(-1)[places[: len(new)]] = format.vocabulary.from_ids("image", new)
    return Image(codes)


def _region_ids(request: Request, drawn: np.ndarray) -> np.ndarray:
    """The first ids of the region, of what has been `drawn` so far: in both orders they come in raster order."""
    assert request.known is not None
    return drawn[request.known[: len(drawn)] == FREE]


def read_regions(
    codec: Codec,
    image: Image,
    cells: np.ndarray,
    requests: Sequence[Request],
    pieces: Iterable[Progress],
    *,
    previews: bool,
) -> Iterator[Piece]:
    """The picture of each request when its region is whole.

    Args:
        previews: show it before, grey where the region is not drawn yet, each time that more of it is.
    """
    drawn = [np.zeros(0, np.int64) for _ in requests]
    shown = [-1] * len(requests)  # codes of each region
    for number, ids, finished in pieces:
        drawn[number] = np.concatenate([drawn[number], ids])
        merged = merge_region(codec.format, image, cells, requests[number], drawn[number])
        count = len(_region_ids(requests[number], drawn[number]))
        if finished:
            (picture,) = codec.decode_images([merged])
            yield Piece(number, 0, picture, whole=True)
        elif previews and count > shown[number]:
            missing = cells & (np.cumsum(cells).reshape(cells.shape) > count)
            yield Piece(number, 0, show_partly(codec, merged, missing), whole=False)
            shown[number] = count


class Infilling:
    """What `MixedModal` draws into documents."""

    codec: Codec
    format: SequenceFormat
    generator: SequenceGenerator
    _plan: Callable[..., Plan]

    def infill(
        self,
        picture: Picture,
        region: Region,
        prompt: str | Sequence[Content] = (),
        *,
        num: int = 1,
        seed: int = 0,
        order: Order = "raster",
        retrieve: int = 0,
        before: Sequence[Before] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[Picture]:
        """`num` pictures that differ from one in a region; all of it is what the image tokenizer redraws.

        Args:
            region: what is drawn anew, see `Region`; whole codes are.
            prompt: texts and pictures before the picture, as its caption.
            order: `raster` draws code by code and knows what stands before each; `masks` reads all that is known of the
                picture and draws the region behind it (CM3; the model must have been trained with masks in pictures).
            seed, retrieve, before, options: see `generate`.

        Raises:
            ValueError: for a region that does not lie in the picture or touches nothing, or one that does not fit into
                the context or the masks.
        """
        more = {"num": num, "seed": seed, "order": order, "retrieve": retrieve, "before": before, **options}
        pieces = self.stream_infill(picture, region, prompt, **cast(Any, more))
        whole = {piece.sample: piece.part for piece in pieces}
        return [cast(Picture, whole[sample]) for sample in range(num)]

    def stream_infill(
        self,
        picture: Picture,
        region: Region,
        prompt: str | Sequence[Content] = (),
        *,
        num: int = 1,
        seed: int = 0,
        order: Order = "raster",
        preview_every: int = 0,
        retrieve: int = 0,
        before: Sequence[Before] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[Piece]:
        """The pictures of `infill` as they come: each when it is whole, and meanwhile what there is of its region.

        Args:
            preview_every: tokens after which an unfinished picture is looked at again, and shown where there is more of
                its region; 0 shows it when it is whole.
        """
        if num < 1 or preview_every < 0:
            raise ValueError(f"num is {num} (at least 1) and preview_every is {preview_every} (at least 0)")
        (image,) = self.codec.encode_pictures([picture])
        refuse_size(options, "a region, which has its picture's")
        grid = image.codes.shape
        cells = cells_of(region, picture.size, self.codec.image_tokenizer.config, grid)
        given = None if before is None else [before]
        plan = self._plan([prompt], "image", num, seed, None, retrieve, given, options, grid)
        requests = fill_region(self.format, plan.requests, image, cells, order)
        chunk = {"chunk": preview_every} if preview_every else {}
        pieces = self.generator.stream(requests, plan.sampling, plan.guidance, **chunk)
        yield from read_regions(self.codec, image, cells, requests, pieces, previews=bool(preview_every))

    def fill_masks(
        self,
        prompt: Sequence[Content],
        *,
        num: int = 1,
        seed: int = 0,
        max_new_tokens: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[list[str]]:
        """`num` times the texts that the masks of a document stand for, in their order.

        Args:
            prompt: a whole document with masks in its texts, as `["a red ", Mask(0), ", flat style", picture]`.
            max_new_tokens: most tokens of each text; None is as many as the context takes beside the later masks.
            seed, options: see `generate`.

        Raises:
            ValueError: where it has no mask, or the same one twice.
        """
        document = self.codec.to_document(prompt)
        fillings = [
            MaskedText(self.generator, self.codec, document, seed, sample, max_new_tokens) for sample in range(num)
        ]
        sampling = build_sampling(self.format.vocabulary.modalities, options)
        refuse_size(options, "masks in texts")
        if is_guided(options):
            raise ValueError("guidance acts on pictures alone; leave it out for masks in texts")
        done: list[FilledText] = []
        while len(done) < num:
            drawn = self.generator.generate([one.request() for one in fillings], sampling)
            done = [text for one, ids in zip(fillings, drawn) if (text := one.take(ids)) is not None]
        return [list(one.masks.values()) for one in done]
