"""Documents with the same picture or the same name are refused, whatever stands beside the picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mixmodal.document import Document, Image, Part, SequenceFormat, build_format
from mixmodal.document.formats import FormatName
from mixmodal.document.parts import Mask
from mixmodal.retrieval.building import MemoryDocument, write_memory
from mixmodal.retrieval.leaks import LeakGuard
from mixmodal.retrieval.memory import HAS_TEXT, TOKEN_KEYS, open_memory
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

VOCABULARY = Vocabulary(VocabularyConfig(codebook_sizes={"image": 16}, num_text_pieces=20, num_sentinels=4))
TOKENS = {**dict.fromkeys(TOKEN_KEYS, "t" * 64), "num_variants": 2}
A, B, C, D = (Image(np.random.default_rng(number).integers(0, 16, (2, 2))) for number in range(4))
OTHER = Image(np.full((2, 2), 15))
TEXT: list[Part] = [Mask(0)]
"""Stands for a text, which needs a tokenizer."""
DOCUMENTS: list[list[Part]] = [[*TEXT, A], [B], TEXT, [A, *TEXT, C], [D, A], [*TEXT, B, *TEXT], [C]]


def guard_of(folder: Path, spelling: SequenceFormat) -> LeakGuard:
    """Over the documents above under the keys 0 .. 6; the second variant of each has another picture."""
    entries = [
        MemoryDocument(str(number), HAS_TEXT, number, [spelling.spell(Document(parts)), other])
        for number, parts in enumerate(DOCUMENTS)
        for other in [spelling.spell(Document([OTHER]))]
    ]
    vectors = np.eye(8, dtype=np.float32)
    write_memory(folder, entries, lambda found: vectors[found], encoder_identity="e", dim=8, tokens=TOKENS, encoder="e")
    return LeakGuard(open_memory(folder, encoder_identity=None), spelling)


@pytest.mark.parametrize("name", ["cm3leon", "chameleon"])
def test_documents_with_one_of_the_pictures_or_the_name_are_refused(tmp_path: Path, name: FormatName) -> None:
    spelling = build_format(name, VOCABULARY, {"image": (2, 2)})
    guard = guard_of(tmp_path, spelling)
    queries: dict[str, list[Part]] = {"a": [*TEXT, A], "bc": [B, *TEXT, C], "6": TEXT, "none": [OTHER], "x": [D]}
    found = guard.refuse(list(queries), [spelling.spell(Document(parts)) for parts in queries.values()])
    rows = np.array([0, 1, 2, 3, 4])
    everything = np.tile(np.array([0, 1, 2, 3, 4, 5, 6, -1]), (len(rows), 1))
    refused = [everything[row][line].tolist() for row, line in enumerate(found(rows, everything))]
    assert refused == [[0, 3, 4], [1, 3, 5, 6], [6], [], [4]]
    # some rows of the batch, in another order, and with documents that come twice
    some = np.array([[4, 4], [6, 0]])
    assert found(np.array([4, 2]), some).tolist() == [[True, True], [True, False]]
    assert found(np.array([0, 1]), np.array([[2, -1], [2, -1]])).tolist() == [[False, False], [False, False]]
    assert found(np.empty(0, np.int64), np.empty((0, 3), np.int64)).shape == (0, 3)
