"""What a document becomes, with others before it: as long as was foretold, and weighed token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import event, given
from hypothesis import strategies as st

from mixmodal.data.source import Randomness
from mixmodal.data.variation import Variation
from mixmodal.document import Run, build_format
from mixmodal.objectives.causal_masked import CausalMasked, CausalMaskedConfig
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

VOCABULARY = Vocabulary(VocabularyConfig(codebook_sizes={"image": 8}, num_text_pieces=30, num_sentinels=6))
FORMATS = ("cm3leon", "chameleon")  # those whose pictures have one grid
FORMAT = {name: build_format(name, VOCABULARY, {"image": (2, 2)}) for name in FORMATS}
SENTINELS = VOCABULARY.ids("sentinel")


def run(modality: str) -> Callable[[list[int]], Run]:
    return lambda numbers: Run(modality, VOCABULARY.to_ids(modality, np.array(numbers)))


texts = st.lists(st.integers(0, 29), min_size=1, max_size=5).map(run("text"))
images = st.lists(st.integers(0, 7), min_size=4, max_size=4).map(run("image"))
masks = st.integers(0, 2).map(lambda index: Run("text", np.array([VOCABULARY.sentinel(index)])))
pairs = st.tuples(texts, images).flatmap(st.permutations)
documents = pairs | st.lists(texts | images | masks, max_size=5)
shares = st.sampled_from([0.0, 0.5, 1.0])
weights = st.sampled_from([0.0, 0.25, 1.0])


@st.composite
def objectives(draw: Any) -> CausalMasked:
    least, more = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    rate = draw(st.sampled_from([0.0, 0.5, 3.0]))
    return CausalMasked(CausalMaskedConfig(min_masks=least, max_masks=least + more, poisson_rate=rate), VOCABULARY)


@given(
    name=st.sampled_from([*FORMATS]),
    stored=st.lists(documents, min_size=1, max_size=3),
    before=st.lists(pairs | documents, max_size=3),
    objective=objectives(),
    room=st.integers(0, 9),
    options=st.fixed_dictionaries(
        {
            "image_first_share": shares,
            "caption_dropout": shares,
            "first_part_weight": weights,
            "retrieved_weight": weights,
        }
    ),
    seed=st.integers(0, 99),
)
def test_a_document_is_as_long_as_was_foretold_whatever_stands_before_it(
    name: str,
    stored: list[list[Run]],
    before: list[list[Run]],
    objective: CausalMasked,
    room: int,
    options: dict[str, float],
    seed: int,
) -> None:
    class Stored(list[np.ndarray]):
        keys = ("a", "b", "c")

        @property
        def lengths(self) -> list[int]:
            return list(map(len, self))

    held = Stored(FORMAT[name].join(runs) for runs in stored)
    others = [FORMAT[name].join(runs) for runs in before]
    added = sum(len(ids) - 1 for ids in others)
    seq_len = max(held.lengths) + added + room  # whatever stands before a document fits beside it
    variation = Variation(FORMAT[name], objective, seq_len=seq_len, **options)  # type: ignore[arg-type]
    randomness = Randomness((seed,))
    for index, ids in enumerate(held):
        length = variation.length(held, index, randomness, added)
        sample = variation.vary("a", ids, randomness.of(index), others)
        assert len(sample.ids) <= length <= seq_len
        chain = FORMAT[name].chain([*others, ids])
        used = chain[np.isin(chain, [*SENTINELS])]
        fresh = SENTINELS.stop - 1 - (int(used.max()) if len(used) else SENTINELS.start - 1)
        content = int(np.asarray(VOCABULARY.is_content(chain)).sum())
        if min(content, fresh) >= objective.config.max_masks:
            assert len(sample.ids) == length
        event("as long as foretold" if len(sample.ids) == length else "shorter")
        assert sample.loss_weights.shape == sample.ids.shape
        assert set(sample.loss_weights[np.isin(sample.ids, [VOCABULARY.bos, *SENTINELS])].tolist()) <= {0.0}
        products = [a * b for a in (1, options["first_part_weight"]) for b in (1, options["retrieved_weight"])]
        assert set(sample.loss_weights.tolist()) <= {0.0, *products}
