"""The batched sampler over ids: prompts in, new ids out, rows independent of each other.

Shapes: B samples, R rows (B, or 2 B with guidance), T tokens, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mixmodal.document import SequenceError, SequenceFormat
from mixmodal.models.transformer import Transformer
from mixmodal.sampling.grammar import Grammar, State
from mixmodal.sampling.guidance import Rule, TokenSampling, build_rules, draw, draw_uniforms, guide


class SequenceGenerator:
    """Continues prompts token by token.

    All rows share one forward a step, with a static cache that lasts from text to images and back. Within images the
    host does not look at the device, and only the columns of the codebook are computed.

    Args:
        model: the network, in evaluation mode.
        format: the sequence format it was trained on.
    """

    def __init__(self, model: Transformer, format: SequenceFormat) -> None:
        self.model = model
        self.format = format

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[np.ndarray],
        seeds: Sequence[int | Sequence[int]],
        *,
        output: str = "mixed",
        sampling: Mapping[str, TokenSampling] | None = None,
        guidance_prompts: Sequence[np.ndarray] | None = None,
        guidance_scale: float = 1.0,
        max_new_tokens: int | None = None,
        before: Sequence[np.ndarray] | None = None,
    ) -> list[np.ndarray]:
        """New ids behind each prompt, int64 `(n,)`, up to and with the token that ended them.

        Args:
            prompts: ids `(T,)` from `<s>` on, of any lengths.
            seeds: one for each prompt; equal seeds give equal samples in any batch.
            output: `text`, a coded modality such as `image` (exactly one), or `mixed` (until `</s>`).
            sampling: settings by modality, as `{"image": TokenSampling(top_k=50)}`.
            guidance_prompts: the same prompts with their text masked; needed for a `guidance_scale` other than 1.
            guidance_scale: weight of classifier-free guidance of codes; 1 is none. Text is never guided.
            max_new_tokens: most tokens behind a prompt; None is as many as fit into the model's `max_seq_len`.
            before: for each prompt what the model reads before it, in place of its `<s>`: what `format.prefix` gives
                for retrieved documents or shots. The row of guidance has the same.

        Raises:
            SequenceError: for a prompt that the format does not allow or behind which the output does not fit.
            ValueError: for settings that can not act.
        """
        if not prompts:
            return []
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many seeds, not {len(seeds)}")
        guidance = self._guidance_rows(prompts, guidance_prompts, guidance_scale, output)
        prefixes = [self.format.prefix([])] * len(prompts) if before is None else before
        self._check_prefixes(prefixes, len(prompts))
        rows = [
            np.concatenate([prefix, prompt[1:]])
            for some in (prompts, guidance)
            for prefix, prompt in zip(prefixes, some)
        ]
        device = self.model.embedding.weight.device
        grammar = Grammar(self.format, output, self.model.config.vocab_size, device)
        rooms = self._rooms(rows, len(prompts), output, max_new_tokens)
        state = grammar.start(prompts, rooms, [len(prefix) - 1 for prefix in prefixes])
        decoder = Decoder(self.model, rows, max(rooms), pad=self.format.vocabulary.pad)
        rules = build_rules(sampling or {}, self.format.vocabulary.modalities, device)
        uniforms = draw_uniforms(seeds, max(rooms)).to(device)
        steps: list[Tensor] = []
        while (stretch := grammar.stretch(state)).num_steps:
            columns = grammar.columns(stretch.modality) if stretch.modality else None
            for _ in range(stretch.num_steps):
                hidden = decoder.advance(steps[-1] if steps else None, grammar.live(state))
                logits = self._logits(hidden, columns, guidance_scale, grammar, state)
                tokens = self._choose(logits, rules, grammar, state, uniforms[:, len(steps)])
                tokens = tokens + (columns.start if columns else 0)
                steps.append(torch.where(grammar.live(state), tokens, self.format.vocabulary.pad))
                state = grammar.advance(state, steps[-1])
        found = torch.stack(steps, dim=1).cpu().numpy()  # (B, T)
        return [row[row != self.format.vocabulary.pad] for row in found]  # pad is never legal: it marks stopped rows

    def _guidance_rows(
        self, prompts: Sequence[np.ndarray], guidance_prompts: Sequence[np.ndarray] | None, scale: float, output: str
    ) -> Sequence[np.ndarray]:
        if scale == 1:
            return []
        if output == "text":
            raise ValueError("guidance_scale acts on coded modalities only; leave it at 1 for the output 'text'")
        if guidance_prompts is None or len(guidance_prompts) != len(prompts):
            raise ValueError("guidance_scale other than 1 needs one guidance prompt for each prompt")
        return guidance_prompts

    def _check_prefixes(self, prefixes: Sequence[np.ndarray], num_prompts: int) -> None:
        if len(prefixes) != num_prompts:
            raise ValueError(f"{num_prompts} prompts need as many sequences before them, not {len(prefixes)}")
        for row, prefix in enumerate(prefixes):
            ends = [self.format.vocabulary.bos, self.format.boundary if len(prefix) > 1 else self.format.vocabulary.bos]
            if not len(prefix) or [prefix[0], prefix[-1]] != ends:
                raise SequenceError(f"what stands before prompt {row} is not what the format's `prefix` gives")

    def _rooms(
        self, rows: Sequence[np.ndarray], num_samples: int, output: str, max_new_tokens: int | None
    ) -> list[int]:
        """Tokens that may follow each prompt: both its rows, with what is before them, must stay within the context."""
        block = self.format.blocks.get(output)
        most = self.model.config.max_seq_len if max_new_tokens is None else max_new_tokens
        if block is not None:
            most = min(most, block.length + 2)  # with the tokens that open and close it
        lengths = [max(len(row) for row in rows[sample::num_samples]) for sample in range(num_samples)]
        return [max(0, min(most, self.model.config.max_seq_len - length)) for length in lengths]

    def _logits(self, hidden: Tensor, columns: slice | None, scale: float, grammar: Grammar, state: State) -> Tensor:
        """Guided logits `(B, V)` of the columns."""
        logits = self.model.logits(hidden, ids=columns)
        if scale == 1:
            return logits
        conditional, unconditional = logits.chunk(2)
        guided = guide(conditional, unconditional, scale)
        return torch.where((grammar.modality(state) > 0)[:, None], guided, conditional)

    def _choose(
        self, logits: Tensor, rules: Sequence[Rule], grammar: Grammar, state: State, uniforms: Tensor
    ) -> Tensor:
        """Columns `(B,)`; where the logits have all columns, those that may not follow are struck out first."""
        if logits.shape[1] == len(grammar.kinds):
            legal = grammar.legal(state) | ~grammar.live(state)[:, None]  # stopped rows: anything, it is not used
            logits = logits.masked_fill(~legal, -torch.inf)
        for rule in rules:
            logits = rule(logits, grammar.modality(state))
        return draw(logits, uniforms)


class Decoder:
    """The rows' cache and positions.

    Args:
        model: the network.
        rows: prompts `(T,)`, right-padded here: a padded slot is overwritten before any query sees it.
        max_new_tokens: steps that the cache must hold.
        pad: id that fills the rows up.
    """

    def __init__(self, model: Transformer, rows: Sequence[np.ndarray], max_new_tokens: int, pad: int) -> None:
        device = model.embedding.weight.device
        lengths = [len(row) for row in rows]
        tokens = torch.full((len(rows), max(lengths)), pad)
        for row, prompt in enumerate(rows):
            tokens[row, : len(prompt)] = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
        self.model = model
        self.cache = model.build_cache(len(rows), max(lengths) + max_new_tokens)
        self.prompts = tokens.to(device)  # (R, T)
        self.positions = torch.tensor(lengths, device=device)  # (R,) of the next token

    def advance(self, tokens: Tensor | None, live: Tensor) -> Tensor:
        """Hidden `(R, D)` behind `tokens` `(B,)`, which every row of a sample gets; None: behind the prompts.

        A row that is not `live` `(B,)` stays at its position, so that it never leaves the context.
        """
        if tokens is None:
            hidden = self.model.hidden(self.prompts, cache=self.cache)  # (R, T, D)
            return hidden[torch.arange(len(hidden), device=hidden.device), self.positions - 1]
        copies = len(self.positions) // len(tokens)
        hidden = self.model.hidden(tokens.repeat(copies)[:, None], self.positions[:, None], cache=self.cache)
        self.positions = self.positions + live.repeat(copies)
        return hidden[:, 0]
