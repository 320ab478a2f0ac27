"""From requests to samples: what is drawn of them, parsed when it is whole and shown before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL.Image import Image as Picture
from PIL.Image import fromarray

from mixmodal.document import PART_TYPES, Coded, Document, EndOfTurn, Grid, Mask, SequenceFormat
from mixmodal.pipeline.options import SamplingOptions, build_guidance, build_sampling
from mixmodal.pipeline.prompts import Prompt, sample_seed, spell_streams
from mixmodal.sampling.engine import Progress, Request
from mixmodal.sampling.generator import SequenceGenerator
from mixmodal.sampling.guidance import Guidance
from mixmodal.sampling.rules import TokenSampling
from mixmodal.tokenization.codec import Codec

UNDRAWN = 235
"""Grey level of what is not drawn yet of a picture."""


Sample = Any
"""A string, a picture, or for `mixed` the list of them: what `output` says."""


class Plan(NamedTuple):
    """What is drawn for some prompts, and how.

    Args:
        requests: as many for each prompt, in their order.
        documents: the prompts.
        read: ids `(T,)` of the whole documents that are read before each prompt.
        sampling: settings by modality.
        guidance: of pictures.
    """

    requests: list[Request]
    documents: list[Document]
    read: list[list[np.ndarray]]
    sampling: dict[str, TokenSampling]
    guidance: Guidance


def build_plan(
    generator: SequenceGenerator,
    prompts: Sequence[Prompt],
    read: Sequence[Sequence[np.ndarray]],
    output: str,
    num: int,
    seed: int,
    max_new_tokens: int | None,
    options: SamplingOptions,
) -> Plan:
    """`num` requests for each prompt, behind the whole documents that are `read` before it.

    Raises:
        ValueError: for settings that can not act.
    """
    format = generator.format
    sampling = build_sampling(format.vocabulary.modalities, options)
    guidance = build_guidance(options, follows_text=output != "text")
    requests: list[Request] = []
    for prompt, documents in zip(prompts, read, strict=True):
        asked = options.get("guidance_scale") is not None
        weight, streams = spell_streams(format, prompt, guidance, output, asked=asked)
        more = {"weight": weight, "streams": streams, "max_new_tokens": max_new_tokens}
        more["before"] = format.prefix(documents)
        seeds = [sample_seed(seed, sample, prompt.ids) for sample in range(num)]
        requests += [generator.request(prompt.ids, one, output, **more) for one in seeds]
    return Plan(requests, [prompt.document for prompt in prompts], [list(row) for row in read], sampling, guidance)


class Piece(NamedTuple):
    """A part of a sample as it is by now.

    Args:
        sample: its number.
        place: of the part in the sample.
        part: the text so far, or the picture.
        whole: whether it stays so. A text is whole where something else follows or the sample ends.
    """

    sample: int
    place: int
    part: str | Picture
    whole: bool


def parse_sample(format: SequenceFormat, prompt: np.ndarray, continuation: np.ndarray) -> Document:
    """The generated parts without an end of turn behind them.

    A sample that ran out of room, or stopped before a block, is ended here.
    """
    eos = format.vocabulary.eos
    if len(continuation) and continuation[-1] == format.vocabulary.end_of_turn:
        continuation = continuation[:-1]
    if len(continuation) and continuation[-1] in {block.open_id for block in format.blocks.values()}:
        continuation = continuation[:-1]
    end = [] if len(continuation) and continuation[-1] == eos else [eos]
    return format.parse_continuation(np.concatenate([prompt, continuation, end]).astype(np.int64), len(prompt))


def sample_of(parts: Sequence[str | Picture | Mask | EndOfTurn], output: str) -> Sample:
    """What a user gets of the parts that were drawn."""
    if output == "mixed":
        return list(parts)
    if output == "text":
        return "".join(part for part in parts if isinstance(part, str))
    return parts[-1]


def read_pieces(
    codec: Codec, requests: Sequence[Request], pieces: Iterable[Progress], *, previews: bool
) -> Iterator[Piece]:
    """Parts of each sample: those that have become whole, and the one that is being drawn.

    Args:
        previews: show pictures before they are whole.
    """
    drawn = [np.zeros(0, np.int64) for _ in requests]
    told = [0] * len(requests)  # parts of each sample that are whole
    for progress in pieces:
        number = progress.number
        drawn[number] = np.concatenate([drawn[number], progress.ids])
        prompt = requests[number].prompt
        ids, begun = _divide(codec.format, prompt, drawn[number])
        document = parse_sample(codec.format, prompt, ids) if len(ids) else Document([])
        parts = document.parts[told[number] :]
        if not progress.finished and begun is None and parts and parts[-1].modality == "text":
            open_text, parts = parts[-1:], parts[:-1]
        else:
            open_text = ()
        for part in codec.from_document(Document(parts)):
            yield Piece(number, told[number], _shown(part), whole=True)
            told[number] += 1
        for part in codec.from_document(Document(open_text)):
            yield Piece(number, told[number], _shown(part), whole=False)
        if previews and begun is not None and len(begun.codes):
            yield Piece(number, told[number], _preview(codec, begun), whole=False)


def _shown(part: object) -> str | Picture:
    return part if isinstance(part, Picture) else str(part)


class Begun(NamedTuple):
    """A coded part that is not whole yet: its modality, grid and first codes `(n,)`."""

    modality: str
    grid: Grid
    codes: np.ndarray


def _divide(format: SequenceFormat, prompt: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, Begun | None]:
    """Drawn ids up to a coded part that is not whole yet, and that part."""
    for modality, block in format.blocks.items():
        if block.lines is not None:
            return _divide_lines(format, modality, prompt, ids)
        is_code = np.asarray(format.vocabulary.contains(modality, ids))
        others = np.flatnonzero(~is_code)
        count = len(ids) - (others[-1] + 1 if len(others) else 0)
        missing = count % block.length
        if missing:
            codes = np.asarray(format.vocabulary.from_ids(modality, ids[len(ids) - missing :]))
            return ids[: len(ids) - missing], Begun(modality, format.grids[modality], codes)
        if count and block.close_id is not None:  # whole, but for the token that closes it
            return np.append(ids, block.close_id), None
    return ids, None


def _divide_lines(
    format: SequenceFormat, modality: str, prompt: np.ndarray, ids: np.ndarray
) -> tuple[np.ndarray, Begun | None]:
    """`_divide` for a block that says its grid first; the prompt may have opened it."""
    block, whole = format.blocks[modality], np.concatenate([prompt, ids])
    assert block.close_id is not None
    opened = np.flatnonzero(whole == block.open_id)
    if not len(opened) or block.close_id in whole[opened[-1] :]:
        return ids, None
    behind = whole[opened[-1] + 1 :]
    grid = format.grid_of(behind[:2])
    codes = behind[np.asarray(format.vocabulary.contains(modality, behind))]
    if grid is not None and len(behind) == block.num_tokens(grid) - 1:  # whole, but for the token that closes it
        return np.append(ids, block.close_id), None
    found = Begun(modality, grid or format.grids[modality], np.asarray(format.vocabulary.from_ids(modality, codes)))
    return ids[: max(0, opened[-1] - len(prompt))], found


def _preview(codec: Codec, begun: Begun) -> Picture:
    """What a picture's first codes show."""
    filled = np.full(begun.grid, begun.codes[-1], dtype=np.int64)
    filled.reshape(-1)[: len(begun.codes)] = begun.codes
    missing = np.arange(filled.size).reshape(begun.grid) >= len(begun.codes)
    return show_partly(codec, PART_TYPES[begun.modality](filled), missing)


def show_partly(codec: Codec, part: Coded, missing: np.ndarray) -> Picture:
    """A picture that is grey where its codes, bool `(h, w)`, are `missing`."""
    (picture,) = codec.decode_images([part])
    shown = np.asarray(picture).copy()
    height, width = (side // cells for side, cells in zip(shown.shape, missing.shape))
    shown[np.kron(missing, np.ones((height, width), dtype=bool))] = UNDRAWN
    return fromarray(shown)
