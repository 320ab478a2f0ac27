"""Retrieved pairs stand in the order of the document they were found for; an only part is no first part."""

import numpy as np
import pytest

from mixmodal.data.variation import Variation
from mixmodal.document import Run, build_format
from mixmodal.objectives.causal_masked import CausalMasked, CausalMaskedConfig
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

VOCABULARY = Vocabulary(VocabularyConfig(codebook_sizes={"image": 8}, num_text_pieces=30, num_sentinels=6))
FORMATS = ("cm3leon", "chameleon")  # those whose pictures have one grid
FORMAT = {name: build_format(name, VOCABULARY, {"image": (2, 2)}) for name in FORMATS}
PLAIN = CausalMasked(CausalMaskedConfig(min_masks=0, max_masks=0), VOCABULARY)
TEXT = Run("text", VOCABULARY.to_ids("text", np.arange(3)))
IMAGE = Run("image", VOCABULARY.to_ids("image", np.arange(4)))


def variation(name: str, **options: float) -> Variation:
    given = {"image_first_share": 0.0, "caption_dropout": 0.0, "first_part_weight": 1.0, **options}
    return Variation(FORMAT[name], PLAIN, seq_len=80, **given)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("own", [[TEXT, IMAGE], [IMAGE, TEXT]])
@pytest.mark.parametrize("other", [[TEXT, IMAGE], [IMAGE, TEXT]])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_retrieved_pairs_stand_as_the_one_they_were_found_for(name: str, own: list, other: list, share: float) -> None:
    form = FORMAT[name]
    sample = variation(name, image_first_share=share).vary(
        "a", form.join(own), np.random.default_rng(0), [form.join(other)]
    )
    stands = form.join(own[::-1] if share else own)
    assert np.array_equal(sample.ids, form.chain([stands, stands]))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("part", [TEXT, IMAGE])
def test_an_only_part_weighs_1(name: str, part: Run) -> None:
    sample = variation(name, first_part_weight=0.25).vary("a", FORMAT[name].join([part]), np.random.default_rng(0))
    assert set(sample.loss_weights[1:].tolist()) == {1.0}
