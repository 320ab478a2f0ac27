"""What stands behind a prompt is given back without the prompt, wherever the prompt ends."""

import numpy as np
import pytest

from mixmodal.document import Document, Image, Mask, Part, SequenceFormat, Text

OTHER = Image(np.full((2, 3), 7))


@pytest.mark.parametrize("start", [[], ["text"], ["image"], ["mask", "image"], ["text", "image", "text"]])
@pytest.mark.parametrize("rest", [["other"], ["other", "image"], ["other", "tail"], ["tail"]])
def test_the_parts_behind_a_prompt_come_back(
    form: SequenceFormat, image: Image, start: list[str], rest: list[str]
) -> None:
    parts: dict[str, Part] = {"text": Text("abc"), "image": image, "mask": Mask(1), "other": OTHER, "tail": Text("jij")}
    before, behind = ([parts[name] for name in names] for names in (start, rest))
    ids = form.spell(Document([*before, *behind]))
    prompt = form.spell_prompt(Document(before), behind[0].modality)
    assert ids[: len(prompt)].tolist() == prompt.tolist()
    assert form.parse_continuation(ids, len(prompt)).parts == tuple(behind)


def test_an_image_that_the_prompt_began_is_given_whole(form: SequenceFormat, image: Image) -> None:
    ids = form.spell(Document([Text("abc"), image, Text("d")]))
    assert form.parse_continuation(ids, 8).parts == (image, Text("d"))


def test_nothing_behind_the_prompt_is_an_empty_document(form: SequenceFormat, image: Image) -> None:
    ids = form.spell(Document([image, Text("abc")]))
    assert form.parse_continuation(ids, len(ids) - 1).parts == ()
