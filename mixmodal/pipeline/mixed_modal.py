"""`MixedModal`: texts and pictures in, texts and pictures out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image as Picture
from typing_extensions import Unpack

from mixmodal.classification.autoregressive import check_method
from mixmodal.classification.likelihoods import SequenceScorer
from mixmodal.document import Document, Grid, Image, Text
from mixmodal.environment import choose_device
from mixmodal.hub import HubOptions
from mixmodal.interop.adapter_files import apply_adapter
from mixmodal.interop.export import find_export, load_export
from mixmodal.models.transformer import Transformer
from mixmodal.pipeline.drawing import Piece, Plan, Sample, build_plan, parse_sample, read_pieces, sample_of
from mixmodal.pipeline.filling import FillingQueue
from mixmodal.pipeline.hub_model import HubModel
from mixmodal.pipeline.infilling import Infilling, Order
from mixmodal.pipeline.options import SamplingOptions
from mixmodal.pipeline.prompts import (
    Before,
    Query,
    check_memory,
    find_documents,
    fit_documents,
    grid_asked_for,
    output_room,
    spell_prompts,
)
from mixmodal.pipeline.queue import Ask, Drawn, Failed, SampleQueue
from mixmodal.pipeline.reranking import Rank, check_best_of, keep_best, rank_by_encoder, rank_by_likelihood
from mixmodal.pipeline.scoring import Scoring
from mixmodal.retrieval.encoder import load_encoder
from mixmodal.retrieval.retriever import DEFAULT_SELECTION, Retrieved, Retriever, load_retriever
from mixmodal.retrieval.selection import SelectionConfig
from mixmodal.sampling.generator import SequenceGenerator
from mixmodal.sampling.grammar import INFILL
from mixmodal.tokenization.codec import Codec, Content


class MixedModal(Infilling, Scoring, HubModel):
    """A trained model with its tokenizers.

    `save_pretrained` writes it as an exported folder, `push_to_hub` to the Hugging Face hub.

    Args:
        model: the network, in evaluation mode.
        codec: its tokenizers and sequence format.
        batch_size: most rows in one forward; samples do not depend on it.
        retriever: finds documents of a memory to stand before prompts; see `attach_memory`.
        folder: that it was loaded from; a memory must be of the image tokenizer in it.

    Attributes:
        generator: draws what `plan` asks for.

    Raises:
        ValueError: for a memory of another vocabulary, sequence format or tokenizer.
    """

    def __init__(
        self,
        model: Transformer,
        codec: Codec,
        batch_size: int = 64,
        retriever: Retriever | None = None,
        folder: Path | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self.model, self.codec, self.batch_size = model, codec, batch_size
        self.format, self.folder = codec.format, folder
        self.retriever = retriever
        self.generator = SequenceGenerator(model, codec.format, batch_size)
        self._scorer = SequenceScorer(model, codec.format, batch_size)
        self._rank: Rank = rank_by_likelihood(self._scorer)

    @classmethod
    def from_pretrained(
        cls,
        source: Path | str,
        device: torch.device | str = "auto",
        dtype: torch.dtype | None = None,
        batch_size: int = 64,
        adapter: Path | str | None = None,
        **hub: Unpack[HubOptions],
    ) -> MixedModal:
        """Loads an exported folder, or one from the Hugging Face hub where huggingface_hub is installed.

        Args:
            source: a folder such as `runs/NAME/export`, or a hub id `OWNER/NAME` or `OWNER/NAME@REVISION`.
            device: `auto` takes the accelerator where there is one.
            dtype: of the network's weights; None keeps the stored one.
            batch_size: most rows in one forward.
            adapter: folder of one that was trained on this model (`runs/NAME/adapter`), which is merged into it.
            hub: how a hub id is fetched: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.

        Raises:
            ExportError: naming the folder and the file that is missing or broken, or the option that can not act; or
                both models, where the adapter is of another.
        """
        folder = find_export(source, hub)
        export = load_export(folder, choose_device(str(device)), dtype)
        model = cls(export.model, export.codec, batch_size, folder=folder)
        if adapter:
            model.adapter = apply_adapter(export.model, folder, Path(adapter))
            model.codec.conversations |= model.adapter.conversations
        return model

    def accelerate(self, *, cuda_graphs: bool = False, compile: bool = False) -> None:
        """Spares the host work on a CUDA device; see `SequenceGenerator.accelerate`."""
        self.generator.accelerate(cuda_graphs=cuda_graphs, compile=compile)

    # retrieval

    @property
    def retriever(self) -> Retriever | None:
        """What finds documents for prompts; None without a memory."""
        return self._retriever

    @retriever.setter
    def retriever(self, retriever: Retriever | None) -> None:
        if retriever is not None:
            check_memory(retriever.memory, self.codec, self.folder)
        self._retriever = retriever

    def attach_memory(
        self,
        folder: Path | str,
        encoder: Path | str | None = None,
        selection: SelectionConfig = DEFAULT_SELECTION,
    ) -> None:
        """Lets `retrieve` take documents from the memory in a folder, which `mixmodal index` writes.

        Args:
            encoder: folder or hub id of the memory's encoder; None is where the memory says that it was.
            selection: which documents may be taken.

        Raises:
            ValueError: where there is no such memory or encoder, or they do not belong to each other or to this model.
        """
        self.retriever = load_retriever(folder, encoder, selection, self.model.embedding.weight.device)

    def retrieve(
        self,
        prompts: Sequence[str | Sequence[Content]],
        count: int,
        output: str = "image",
        *,
        max_new_tokens: int | None = None,
        random_seed: int | None = None,
    ) -> list[list[Retrieved]]:
        """What `generate(..., retrieve=count)` has the model read before each prompt, in this order: the best last.

        Those with one text and one picture stand as the prompt does, text first or picture first. There are fewer than
        `count` where fewer may be taken, or where more do not fit into the context beside the output.

        Args:
            output, max_new_tokens: as for `generate`; they say how much stands behind the prompt.
            random_seed: draws documents at random instead, a control that tells what nearness is worth.

        Raises:
            ValueError: where no memory is attached, or for an empty prompt.
        """
        room = output_room(self.format, output, max_new_tokens)
        queries = [prompt.query(room) for prompt in spell_prompts(self.codec, prompts, output)]
        return self._find(queries, count, random_seed)

    def retrieve_for_classes(
        self,
        images: Sequence[Picture],
        classes: Sequence[str],
        method: str,
        count: int,
        *,
        random_seed: int | None = None,
    ) -> list[list[Retrieved]]:
        """`retrieve` for pictures that are classified: found by the picture alone, the same before every class."""
        check_method(method)
        block = self.format.blocks["image"]
        longest = max(self.format.allowed_grids("image"), key=block.num_tokens)
        grid = Image(np.zeros(longest, dtype=np.int64))
        length = max(len(self.format.spell(Document([Text(caption), grid]))) for caption in classes)
        text_first = method == "image_given_text"
        return self._find([Query([image], length, text_first) for image in images], count, random_seed)

    def _find(self, queries: Sequence[Query], count: int, random_seed: int | None = None) -> list[list[Retrieved]]:
        if self.retriever is None:
            raise ValueError(f"{count} documents are to be retrieved, but no memory is attached; call attach_memory")
        return find_documents(self.retriever, self.codec, queries, count, self.model.config.max_seq_len, random_seed)

    # generation

    def attach_ranker(self, encoder: Path | str) -> None:
        """Lets `best_of` choose by a CLIP or SigLIP, a folder or hub id, in place of the model's own likelihood.

        Raises:
            ValueError: where there is no such encoder.
        """
        self._rank = rank_by_encoder(load_encoder(encoder, self.model.embedding.weight.device), self.codec)

    def generate(
        self,
        prompt: str | Sequence[Content],
        output: str = "image",
        *,
        num: int = 1,
        seed: int = 0,
        best_of: int = 1,
        max_new_tokens: int | None = None,
        retrieve: int = 0,
        before: Sequence[Before] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[Sample]:
        """`num` samples behind one prompt.

        Args:
            prompt: texts and pictures in order; `generate_batch` takes several prompts.
            output: `text` gives strings, `image` pictures, `mixed` lists of both.
            seed: equal seeds give equal samples, whatever else is generated with them.
            best_of: candidates drawn for each image, of which the one is kept from which the model reads the prompt's
                text best, by log p(text | image), or that is nearest to it by the encoder of `attach_ranker`:
                re-ranking as DALL-E does with CLIP (arXiv 2102.12092, 2.6).
            max_new_tokens: most tokens of a sample; None is as many as the model's context takes.
            retrieve: documents of the attached memory that the model reads before the prompt; see `retrieve`.
            before: other whole documents that it reads in their place, in this order: shots as
                `[[picture, "a red apple"], ...]`, or what `retrieve` has found. Where not all fit into the context
                beside the output, the first ones are left out, with a warning.
            options: how tokens are drawn and pictures guided, see `SamplingOptions`: `temperature=`, `top_k=`,
                `guidance_scale=`, ...

        Raises:
            ValueError: for settings that can not act, or a prompt behind which the output does not fit.
        """
        more: dict[str, Any] = {"best_of": best_of, "max_new_tokens": max_new_tokens, "retrieve": retrieve, **options}
        more["before"] = None if before is None else [before]
        return self.generate_batch([prompt], output, num=num, seed=seed, **more)[0]

    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[Content]],
        output: str = "image",
        *,
        num: int = 1,
        seed: int = 0,
        best_of: int = 1,
        max_new_tokens: int | None = None,
        retrieve: int = 0,
        before: Sequence[Sequence[Before]] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[list[Sample]]:
        """`num` samples for each of many prompts; the arguments are those of `generate`, `before` for each prompt."""
        if min(num, best_of) < 1:
            raise ValueError(f"num is {num} and best_of is {best_of}; both must be at least 1")
        plan = self._plan(prompts, output, num * best_of, seed, max_new_tokens, retrieve, before, options)
        check_best_of(self.format, output, plan.sampling, best_of)
        drawn = self.generator.generate(plan.requests, plan.sampling, plan.guidance)
        found = [parse_sample(self.format, request.prompt, ids) for request, ids in zip(plan.requests, drawn)]
        if best_of > 1:
            asked = [(plan.documents[row], plan.read[row]) for row in range(len(prompts)) for _ in range(num * best_of)]
            found = keep_best(self._rank, asked, found, best_of)
        samples = [sample_of(parts, output) for parts in self.codec.from_documents(found)]
        return [samples[start : start + num] for start in range(0, len(samples), num)]

    def generate_each(
        self,
        prompts: Iterable[Ask | Failed],
        output: str = "image",
        *,
        best_of: int = 1,
        max_new_tokens: int | None = None,
        retrieve: int = 0,
        order: Order = "raster",
        **options: Unpack[SamplingOptions],
    ) -> Iterator[Drawn | Failed]:
        """The samples of any number of prompts, each as soon as it is drawn, in whatever order they end.

        Prompts are taken as there is room for them, so that neither all of them nor all samples are held at a time.
        One that can not be drawn is given back as `Failed`, and the others go on.

        Args:
            prompts: each with its number of samples and its seed; the other arguments are those of `generate`.
            output: or `infill`, for prompts with masks in texts, of which samples are `FilledText`, or with a
                `PartialPicture` as their last part. `order` is that of `infill`.

        Raises:
            ValueError: for settings that can not act, whatever the prompts are.
        """
        if (best_of if output == INFILL else order) not in (1, "raster"):
            raise ValueError("best_of can not act on the output infill, nor order on any other; leave it out")
        if output != INFILL:  # of which the kind of each prompt's holes decides
            self._check_output(output)
        drawn, room = ("image", None) if output == INFILL else (output, max_new_tokens)

        def plan(ask: Ask, parts: Sequence[Content], grid: Grid | None = None) -> Plan:
            before = None if ask.before is None else [ask.before]
            return self._plan([parts], drawn, ask.num * best_of, ask.seed, room, retrieve, before, options, grid)

        common = self.generator, self.codec, options, plan
        if output == INFILL:
            return FillingQueue(*common, order, max_new_tokens, retrieve).draw(prompts)
        return SampleQueue(*common, output, best_of, self._rank).draw(prompts)

    def room_left(self, prompt: str | Sequence[Content], output: str = "mixed") -> int:
        """Tokens of the model's context that are free beside a prompt and its output; below 0 it does not fit."""
        (spelled,) = spell_prompts(self.codec, [prompt], output)
        return self.model.config.max_seq_len - len(spelled.ids) - output_room(self.format, output, None)

    def stream(
        self,
        prompt: str | Sequence[Content],
        output: str = "mixed",
        *,
        num: int = 1,
        seed: int = 0,
        preview_every: int = 0,
        max_new_tokens: int | None = None,
        retrieve: int = 0,
        before: Sequence[Before] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[Piece]:
        """The samples of `generate` in pieces, as they come: whole parts, and meanwhile what there is of them.

        Args:
            preview_every: codes after which an unfinished picture is shown again; 0 shows it when it is whole.
        """
        if num < 1 or preview_every < 0:
            raise ValueError(f"num is {num} (at least 1) and preview_every is {preview_every} (at least 0)")
        given = None if before is None else [before]
        plan = self._plan([prompt], output, num, seed, max_new_tokens, retrieve, given, options)
        chunk = {"chunk": preview_every} if preview_every else {}
        pieces = self.generator.stream(plan.requests, plan.sampling, plan.guidance, **chunk)
        yield from read_pieces(self.codec, plan.requests, pieces, previews=bool(preview_every))

    def plan(
        self,
        prompts: Sequence[str | Sequence[Content]],
        output: str,
        num: int,
        seed: int,
        max_new_tokens: int | None,
        options: SamplingOptions,
    ) -> Plan:
        """What `generate_batch` would draw, for those who want ids or codes of it; the arguments are its own."""
        return self._plan(prompts, output, num, seed, max_new_tokens, 0, None, options)

    def _check_output(self, output: str) -> None:
        """Whether the model can show what it draws, before it begins: mixed samples have pictures by chance."""
        if output != "text":
            self.codec.image_tokenizer.check_decoder()

    def _plan(
        self,
        prompts: Sequence[str | Sequence[Content]],
        output: str,
        num: int,
        seed: int,
        max_new_tokens: int | None,
        retrieve: int,
        before: Sequence[Sequence[Before]] | None,
        options: SamplingOptions,
        grid: Grid | None = None,
    ) -> Plan:
        """`num` requests for each prompt; `grid` stands in for the size of the options."""
        self._check_output(output)
        if retrieve and before is not None:
            raise ValueError("retrieve and before both say what is read before the prompt; give one of them")
        if grid is None:
            grid = grid_asked_for(self.codec, output, options)
        spelled = spell_prompts(self.codec, prompts, output, grid)
        room = output_room(self.format, output, max_new_tokens, grid)
        queries = [prompt.query(room) for prompt in spelled]
        if retrieve:
            before = self._find(queries, retrieve)
        lengths, context = [query.length for query in queries], self.model.config.max_seq_len
        read = fit_documents(self.codec, [[]] * len(spelled) if before is None else before, lengths, context)
        return build_plan(self.generator, spelled, read, output, num, seed, max_new_tokens, options)
