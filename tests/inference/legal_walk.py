"""What a grammar lets through, drawn without a network."""

import numpy as np
import torch

from mixmodal.document import SequenceFormat
from mixmodal.sampling.grammar import Grammar


def walk(form: SequenceFormat, output: str, prompts: list[np.ndarray], rooms: list[int], seed: int) -> list[np.ndarray]:
    """Draws uniformly among the legal ids until every row is done."""
    generator = torch.Generator().manual_seed(seed)
    grammar = Grammar(form, output, form.vocabulary.size)
    state = grammar.start(prompts, rooms)
    drawn: list[list[int]] = [[] for _ in prompts]
    while grammar.live(state).any():
        weights = grammar.legal(state).double() + ~grammar.live(state)[:, None]
        assert (weights.sum(dim=1) > 0).all()
        tokens = torch.multinomial(weights, 1, generator=generator)[:, 0]
        for row, token in enumerate(tokens.tolist()):
            if grammar.live(state)[row]:
                drawn[row].append(token)
        state = grammar.advance(state, tokens)
    return [np.array(tokens, dtype=np.int64) for tokens in drawn]
