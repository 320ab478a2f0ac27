"""Prompts as ids, and the documents that stand before them: retrieved ones or shots, as many as fit."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL.Image import Image as Picture

from mixmodal.document import Coded, Document, EndOfTurn, Grid, Mask, Part, SequenceFormat, Text, count_fitting
from mixmodal.interop.export import IMAGE_TOKENIZER
from mixmodal.pipeline.options import SamplingOptions, refuse_size
from mixmodal.retrieval.encoder import DocumentParts
from mixmodal.retrieval.memory import Memory
from mixmodal.retrieval.retriever import Retrieved, Retriever
from mixmodal.sampling.grammar import MIXED
from mixmodal.sampling.guidance import Guidance, Stream, build_streams
from mixmodal.tokenization.codec import Codec, Content
from mixmodal.tokenization.image import ImageTokenizer

logger = logging.getLogger(__name__)

TEXT_ROOM = 32
"""Tokens that are kept free for a text of which no length is given."""

Before = Retrieved | Document | Sequence[Content]
"""A whole document that a model reads before a prompt."""


class Prompt(NamedTuple):
    """A prompt in its three forms.

    Args:
        parts: as the user gave it.
        document: with pictures as codes.
        ids: open for the output, int64 `(T,)`.
        grid: of the codes that it is open for; None where the model is free.
    """

    parts: list[Content]
    document: Document
    ids: np.ndarray
    grid: Grid | None = None

    def query(self, room: int) -> Query:
        """What documents are retrieved for, where `room` tokens are to follow."""
        first = bool(self.document.parts) and self.document.parts[0].modality == "text"
        return Query(self.parts, len(self.ids) + room, first)


class Query(NamedTuple):
    """What documents are retrieved for.

    Args:
        parts: texts and pictures that they are to be near to.
        length: tokens of the document that they stand before, whole.
        text_first: whether it begins with text: they are turned as it is.
    """

    parts: Sequence[Content]
    length: int
    text_first: bool


def parts_of(prompt: str | Picture | Iterable[Content]) -> list[Content]:
    """One text or picture as a list of one part; a list as it is.

    Raises:
        ValueError: for a list of lists.
    """
    if isinstance(prompt, (str, Picture)):
        return [prompt]
    parts = list(prompt)
    if any(isinstance(part, (list, tuple)) for part in parts):
        raise ValueError("a prompt is a list of texts and pictures; give several prompts to generate_batch")
    return parts


def check_output(format: SequenceFormat, output: str) -> None:
    """Whether the format has an output.

    Raises:
        ValueError: naming those that it has.
    """
    if output not in ("text", *format.blocks, MIXED):
        raise ValueError(f"output {output!r} is unknown; choose text, {', '.join(format.blocks)}, {MIXED}")


def grid_asked_for(codec: Codec, output: str, options: SamplingOptions) -> Grid | None:
    """The grid of codes of the size that is asked for; None where none is.

    Raises:
        ValueError: for a size that pictures of the model have not, or another output than pictures.
    """
    if options.get("size") is None:
        return None
    if output != "image":
        refuse_size(options, f"the output {output}")
    width, height = options.get("size") or (0, 0)
    return codec.grid_of_size((width, height))


def spell_prompts(
    codec: Codec, prompts: Sequence[str | Sequence[Content]], output: str, grid: Grid | None = None
) -> list[Prompt]:
    """Prompts that are open for an output.

    Args:
        grid: of its codes; None leaves it to the model.

    Raises:
        ValueError: for an output that the format does not have, or a wrong part.
    """
    format, parts = codec.format, [parts_of(prompt) for prompt in prompts]
    check_output(format, output)
    documents = codec.to_documents(parts)
    rows = [format.spell_prompt(document, None if output == MIXED else output, grid) for document in documents]
    return [Prompt(*forms, grid) for forms in zip(parts, documents, rows)]


def check_guided(guidance: Guidance, output: str) -> None:
    """Whether guidance can act on an output.

    Raises:
        ValueError: where it is text.
    """
    if guidance.acts and output == "text":
        raise ValueError("guidance acts on pictures alone; leave it out for the output 'text'")


def spell_streams(
    format: SequenceFormat, prompt: Prompt, guidance: Guidance, output: str, *, asked: bool = True
) -> tuple[float, tuple[Stream, ...]]:
    """The weight of a prompt's own row, and the rows of guidance beside it; none for guidance that does not act.

    Args:
        asked: whether the text's scale was asked for; otherwise a prompt without text goes without.

    Raises:
        ValueError: where there is nothing that the guidance could strengthen.
    """
    if not guidance.acts:
        return 1.0, ()
    check_guided(guidance, output)
    parts = prompt.document.parts
    has_text, has_pictures = (any(isinstance(part, kind) for part in parts) for kind in (Text, Coded))
    if not has_text and not asked and not guidance.contrast_k:
        if guidance.image_scale == 1:
            return 1.0, ()
        guidance = replace(guidance, text_scale=1.0)
    if not has_text and (guidance.contrast_k or guidance.text_scale != 1):
        raise ValueError("guidance_scale and contrast_k strengthen the prompt's text, and it has none; leave them out")
    if not has_pictures and guidance.image_scale != 1:
        raise ValueError("image_guidance_scale strengthens the prompt's pictures, and it has none; leave it at 1")
    following = None if output == MIXED else output
    if guidance.unconditional == "mask":
        without_text = [Mask(0) if isinstance(part, Text) else part for part in parts]
        turn = parts[-1:] if parts and isinstance(parts[-1], EndOfTurn) else ()  # whose turn it is is no content
        nothing: list[Part] = [Mask(0), *turn]
    else:
        without_text, nothing = [part for part in parts if not isinstance(part, Text | EndOfTurn)], []
    rows = [format.spell_prompt(Document(some), following, prompt.grid) for some in (without_text, nothing)]
    bare = not nothing and not format.guides_with_bos
    return build_streams(guidance, prompt.ids, *rows, bare=bare)


def sample_seed(seed: int, sample: int, prompt: np.ndarray) -> list[int]:
    """The entropy of one sample: of its prompt too, so that other prompts do not share its luck.

    Documents before it do not change it, so that samples with and without them differ by these alone.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be 0 or more")
    digest = hashlib.sha256(np.asarray(prompt, dtype=np.int64).tobytes()).digest()
    return [seed, sample, int.from_bytes(digest[:8], "little")]


# documents before a prompt


def check_memory(memory: Memory, codec: Codec, folder: Path | None) -> None:
    """Whether the documents of a memory are spelled as a model reads them.

    Args:
        folder: of the exported model, whose image tokenizer must be the memory's; None is not compared.

    Raises:
        ValueError: naming the memory's manifest and what differs.
    """
    format = codec.format
    try:
        memory.check_tokens(
            vocabulary_digest=format.vocabulary.digest,
            sequence_format=format.settings,
            text_tokenizer_sha256=codec.text_tokenizer.sha256,
            image_tokenizer_sha256=None if folder is None else ImageTokenizer.sha256(folder / IMAGE_TOKENIZER),
        )
    except ValueError as error:
        raise ValueError(f"the memory can not be read by this model: {error}") from error


def output_room(format: SequenceFormat, output: str, max_new_tokens: int | None, grid: Grid | None = None) -> int:
    """Tokens that are kept free behind a prompt, for the output and the end of the document.

    Args:
        grid: of the codes that the prompt is open for; None keeps room for any.
    """
    blocks = {name: block.num_tokens() + 1 for name, block in format.blocks.items()}
    if output in blocks and grid is not None:
        return format.blocks[output].num_tokens(grid) + 1 - len(format.size_lead(output, grid))
    if output in blocks:
        return blocks[output]
    if max_new_tokens is not None:
        return max_new_tokens
    return TEXT_ROOM + (max(blocks.values(), default=0) if output == MIXED else 0)


def spell_documents(codec: Codec, documents: Sequence[Before]) -> list[np.ndarray]:
    """Whole documents as ids `(T,)`, in whatever form they are given."""
    spelled: list[np.ndarray] = []
    for one in documents:
        if isinstance(one, Retrieved):
            spelled.append(one.ids)
        else:
            document = one if isinstance(one, Document) else codec.to_document(parts_of(one))
            spelled.append(codec.format.spell(document))
    return spelled


def find_documents(
    retriever: Retriever,
    codec: Codec,
    queries: Sequence[Query],
    count: int,
    max_seq_len: int,
    random_seed: int | None = None,
) -> list[list[Retrieved]]:
    """Documents of the memory for each query, the best last, turned as it is, as many as fit.

    Args:
        random_seed: draws them at random; None takes the nearest.
    """
    wanted = [_document_parts(codec, query.parts) for query in queries]
    found = retriever.find(wanted, count) if random_seed is None else retriever.random(wanted, count, random_seed)
    turned = [
        [one._replace(ids=codec.format.order_pair(one.ids, text_first=query.text_first)) for one in row]
        for row, query in zip(found, queries)
    ]
    lengths = [query.length for query in queries]
    counts = _count_last([[one.ids for one in row] for row in turned], lengths, max_seq_len)
    return [row[len(row) - count :] for row, count in zip(turned, counts)]


def fit_documents(
    codec: Codec, before: Sequence[Sequence[Before]], lengths: Sequence[int], max_seq_len: int
) -> list[list[np.ndarray]]:
    """As many of the last documents of `before`, ids `(T,)`, as fit before others of `lengths` tokens.

    Raises:
        ValueError: where `before` has not as many entries as there are others.
    """
    if len(before) != len(lengths):
        raise ValueError(f"before has documents for {len(before)} prompts; there are {len(lengths)}")
    spelled = [spell_documents(codec, row) for row in before]
    counts = _count_last(spelled, lengths, max_seq_len)
    return [row[len(row) - count :] for row, count in zip(spelled, counts)]


def _count_last(documents: Sequence[Sequence[np.ndarray]], lengths: Sequence[int], max_seq_len: int) -> list[int]:
    """How many documents, counted from the last, fit before others of `lengths` tokens; a warning tells of the rest.

    Args:
        documents: ids `(T,)`, for each of the others.
        max_seq_len: the model's context, which they share.
    """
    counts = [
        count_fitting([len(ids) for ids in reversed(row)], max_seq_len - length)
        for row, length in zip(documents, lengths)
    ]
    short = [(count, len(row)) for count, row in zip(counts, documents) if count < len(row)]
    if short:
        used, given = min(short)
        logger.warning(
            "%d of %d prompts have fewer documents before them than there are (%d instead of %d at the least): "
            "more do not fit into the model's context of %d tokens beside prompt and output",
            len(short),
            len(counts),
            used,
            given,
            max_seq_len,
        )
    return counts


def _document_parts(codec: Codec, parts: Sequence[Content]) -> DocumentParts:
    """Texts and pictures of a prompt; codes are shown as the picture that they stand for."""
    coded = [part for part in parts if isinstance(part, Coded)]
    pictures = iter(codec.decode_images(coded))
    texts = [part.text if isinstance(part, Text) else part for part in parts if isinstance(part, (str, Text))]
    images = [
        next(pictures) if isinstance(part, Coded) else part for part in parts if isinstance(part, (Coded, Picture))
    ]
    return DocumentParts(texts, images)
