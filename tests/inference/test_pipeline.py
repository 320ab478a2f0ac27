"""What users call: shapes of answers, seeds, batches, likelihoods and messages."""

import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PIL

from mixmodal import MixedModal
from mixmodal.classification.likelihoods import ScoredSequence
from mixmodal.document import Document, Mask, SequenceError, Text
from mixmodal.interop.export import EXPORT_FILES, ExportError
from mixmodal.pipeline import mixed_modal as module
from mixmodal.pipeline.prompts import spell_prompts, spell_streams
from mixmodal.sampling.guidance import Guidance

PROMPTS = [["a red apple"], ["pear"], ["a green apple, flat style"]]


@pytest.fixture
def model(exported: Path) -> MixedModal:
    return MixedModal.from_pretrained(exported, device="cpu")


@pytest.fixture
def picture() -> PIL.Image:
    return PIL.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def same(first: PIL.Image, second: PIL.Image) -> bool:
    return first.tobytes() == second.tobytes()


def test_each_output_has_its_type(model: MixedModal, picture: PIL.Image) -> None:
    images = model.generate(["a red apple"], output="image", guidance_scale=3.0, num=2, seed=0)
    assert [image.size for image in images] == [(16, 16)] * 2
    (text,) = model.generate([picture, "What is this?"], output="text", max_new_tokens=8)
    assert isinstance(text, str)
    (mixed,) = model.generate("a red", output="mixed")
    assert all(isinstance(part, (str, PIL.Image)) for part in mixed)


def test_an_output_fits_where_room_is_left(model: MixedModal) -> None:
    prompt = "a red apple"
    while model.room_left(f"{prompt} pear", "image") >= 0:
        prompt += " pear"
    model.generate(prompt, "image")
    while (
        model.room_left(prompt, "image") >= -2
    ):  # the end of the document, which may be missing, and what opens a picture
        prompt += " pear"
    with pytest.raises(SequenceError, match="image"):
        model.generate(prompt, "image")


def test_samples_are_what_was_generated_and_not_the_prompt(model: MixedModal, picture: PIL.Image) -> None:
    for seed in range(2):
        (mixed,) = model.generate(["a red apple", picture, "pear"], output="mixed", seed=seed)
        if mixed:
            assert not (isinstance(mixed[0], str) and mixed[0].startswith("a red apple"))
        (text,) = model.generate(["a red apple"], output="text", seed=seed, max_new_tokens=6)
        assert not text.startswith("a red apple")


def test_a_text_that_stopped_before_a_picture_is_read_without_its_break(
    model: MixedModal, picture: PIL.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = model.format.vocabulary.to_ids("text", np.array(model.codec.text_tokenizer.encode("pear")))
    ids = np.append(pieces, model.format.blocks["image"].open_id)
    monkeypatch.setattr(model.generator, "generate", lambda *args, **kwargs: [ids])
    assert model.generate([picture], output="text") == ["pear"]


def test_a_sample_depends_on_prompt_and_seed_alone(exported: Path) -> None:
    small, large = (MixedModal.from_pretrained(exported, "cpu", batch_size=size) for size in (2, 64))
    batch = large.generate_batch(PROMPTS, num=3, seed=5)
    for prompt, samples in zip(PROMPTS, batch):
        assert all(same(*pair) for pair in zip(small.generate(prompt, num=3, seed=5), samples))
    assert not same(batch[0][0], batch[0][1])
    assert not same(batch[0][0], large.generate(PROMPTS[0], seed=6)[0])


def test_settings_reach_the_sampler(model: MixedModal) -> None:
    greedy = model.generate(["pear"], num=3, temperature=0)
    assert same(greedy[0], greedy[1])
    assert same(greedy[0], model.generate(["pear"], temperature={"image": 0.0})[0])
    assert same(greedy[0], model.generate(["pear"], top_k=1)[0])
    assert same(greedy[0], model.generate(["pear"], top_p={"image": 1e-6})[0])
    assert not same(greedy[0], model.generate(["pear"], temperature={"text": 0.0})[0])


def test_of_several_images_the_one_is_kept_that_reads_best(
    model: MixedModal, picture: PIL.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.codec, "from_documents", lambda found: [document.parts for document in found])  # codes
    for prompt in (["a red apple"], [picture, "pear"]):
        candidates = model.generate(prompt, num=6, seed=5)
        *pictures, text = model.codec.to_document(prompt).parts
        spelled = [model.format.spell_continuation(Document([*pictures, one]), Document([text])) for one in candidates]
        totals = [float(model._scorer.score([ScoredSequence(*pair)]).totals[0]) for pair in spelled]
        first, second = int(np.argmax(totals[:3])), 3 + int(np.argmax(totals[3:]))
        assert model.generate(prompt, num=2, seed=5, best_of=3) == [candidates[first], candidates[second]]
    assert (first, second) != (0, 3)  # so that keeping the first candidate would not do


def test_log_likelihood_of_a_picture_counts_its_codes(model: MixedModal, picture: PIL.Image) -> None:
    score = model.log_likelihood(context=["a red apple"], continuation=[picture])
    assert score.count == 16
    assert score.total < 0
    assert model.log_likelihood([], ["pear"]).count == len(model.codec.text_tokenizer.encode("pear")) + 1


@pytest.mark.parametrize("method", ["image_given_text", "text_given_image"])
def test_the_likeliest_class_is_chosen(model: MixedModal, picture: PIL.Image, method: str) -> None:
    classes = ["a red apple", "pear", "a green apple"]
    pairs = [([one], [picture]) if method == "image_given_text" else ([picture], [one]) for one in classes]
    totals = [model.log_likelihood(*pair).total for pair in pairs]
    assert model.classify(picture, classes, method=method) == classes[int(np.argmax(totals))]
    found = model.score_classes([picture], classes, method)
    np.testing.assert_allclose(found.scores[0], totals, atol=1e-5, rtol=0)  # worst seen 5e-7


def test_an_encoder_ranks_in_place_of_the_model(model: MixedModal, monkeypatch: pytest.MonkeyPatch) -> None:
    class Brightness:
        """The brightest picture is nearest to any text but `dark`."""

        def embed_texts(self, texts: list[str]) -> np.ndarray:
            return np.array([[-1.0] if text == "dark" else [1.0] for text in texts])

        def embed_images(self, images: list[PIL.Image]) -> np.ndarray:
            return np.array([[np.asarray(image).mean()] for image in images])

    prompts = ["pear", "dark"]
    candidates = model.generate_batch(prompts, num=6, seed=5)
    monkeypatch.setattr(module, "load_encoder", lambda folder, device: Brightness())
    model.attach_ranker("clip")
    best = [
        [sorted(row[start : start + 3], key=lambda one: sign * np.asarray(one).mean())[-1] for start in (0, 3)]
        for row, sign in zip(candidates, (1, -1), strict=True)
    ]
    assert model.generate_batch(prompts, num=2, best_of=3, seed=5) == best


@pytest.mark.parametrize("unconditional", ["mask", "drop"])
def test_rows_of_guidance_know_less_of_the_prompt(model: MixedModal, picture: PIL.Image, unconditional: str) -> None:
    (prompt,) = spell_prompts(model.codec, [["a", picture, "pear"]], "image")
    guidance = Guidance(text_scale=3.0, image_scale=1.5, unconditional=unconditional)  # type: ignore[arg-type]
    weight, streams = spell_streams(model.format, prompt, guidance, "image")
    image = prompt.document.parts[1]
    masks = {"mask": ([Mask(0), image, Mask(0)], [Mask(0)]), "drop": ([image], [])}[unconditional]
    for stream, parts in zip(streams, masks, strict=True):
        assert stream.prompt.tolist() == model.format.spell_prompt(Document(parts), "image").tolist()
    assert (weight, *(stream.weight for stream in streams)) == (3.0, -1.5, -0.5)


def test_guidance_needs_something_to_strengthen(model: MixedModal, picture: PIL.Image) -> None:
    for prompt, options, message in (
        ([picture], {"guidance_scale": 2.0}, "strengthen the prompt's text, and it has none"),
        ([picture], {"contrast_k": 2}, "strengthen the prompt's text, and it has none"),
        (["pear"], {"image_guidance_scale": 2.0}, "strengthens the prompt's pictures, and it has none"),
        (["pear"], {"guidance_scale": 2.0, "output": "text"}, "guidance acts on pictures alone"),
        (["pear"], {"contrast_k": 2, "guidance_scale": 2.0}, "contrast_k takes the place of the scales"),
        (["pear"], {"unconditional": "drop", "guidance_scale": 1.0}, "unconditional can not act without"),
        (["pear"], {"guidance": 2.0}, "there is no option 'guidance'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(prompt, **options)  # type: ignore[arg-type]


def test_pictures_that_follow_a_text_are_guided_by_default(model: MixedModal, picture: PIL.Image) -> None:
    for prompt in (["pear"], [picture, "pear"]):
        found = model.generate(prompt, num=3)
        assert found == model.generate(prompt, num=3, guidance_scale=2.0)
        assert found != model.generate(prompt, num=3, guidance_scale=1.0)
        assert model.generate(prompt, contrast_k=2) == model.generate(prompt, contrast_k=2, guidance_scale=1.0)
    assert model.generate([picture], num=3) == model.generate([picture], num=3, guidance_scale=1.0)
    assert model.generate([picture], unconditional="drop") == model.generate([picture])


@pytest.mark.parametrize("output", ["text", "image", "mixed"])
def test_pieces_end_as_the_samples(model: MixedModal, output: str) -> None:
    options = {"num": 3, "seed": 4, "max_new_tokens": 40}
    wanted = model.generate("pear", output, **options)
    parts: dict[int, dict[int, object]] = {0: {}, 1: {}, 2: {}}
    for piece in model.stream("pear", output, preview_every=3, **options):
        assert not isinstance(parts[piece.sample].get(piece.place), tuple), "a whole part came again"
        parts[piece.sample][piece.place] = (piece.part,) if piece.whole else piece.part
    for sample, found in zip(wanted, parts.values()):
        assert all(isinstance(part, tuple) for part in found.values())
        pieces = [part[0] for _, part in sorted(found.items())]  # type: ignore[index]
        expected = sample if output == "mixed" else [sample]
        assert [one if isinstance(one, str) else one.tobytes() for one in pieces] == [
            one if isinstance(one, str) else one.tobytes() for one in expected if one != ""
        ]


def test_a_picture_is_shown_while_it_is_drawn(model: MixedModal) -> None:
    pieces = list(model.stream("pear", "image", preview_every=5))
    assert [piece.whole for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    shown = [np.asarray(piece.part) for piece in pieces]
    grey = [int((one == 235).all(axis=-1).sum()) for one in shown]
    assert len(pieces) == 4
    assert grey == sorted(grey, reverse=True)
    assert grey[0] > grey[-1]
    rows = model.codec.image_tokenizer.config.image_size // 4
    assert np.abs(shown[-2][:rows].astype(int) - shown[-1][:rows]).max() < 255  # the first row of codes is there


def test_a_cut_character_is_a_replacement_and_no_crash(model: MixedModal) -> None:
    for seed in range(3):
        assert isinstance(model.generate(["\u00e9\u4e2d"], output="text", seed=seed, max_new_tokens=1)[0], str)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "picture"}, "choose text, image, mixed"),
        ({"num": 0}, "num is 0"),
        ({"best_of": 0}, "best_of is 0"),
        ({"best_of": 2, "output": "text"}, "best_of chooses among images that differ"),
        ({"best_of": 2, "temperature": 0.0}, "a temperature above 0"),
        ({"seed": -1}, "seed is -1"),
        ({"top_p": {"sound": 0.5}}, "top_p for 'sound'; the model has text, image"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"output": "text", "guidance_scale": 2.0}, "acts on pictures alone"),
        ({"max_new_tokens": 3}, "too few for the output"),
    ],
)
def test_settings_that_can_not_act_are_refused(model: MixedModal, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(["a red apple"], **options)


def test_wrong_prompts_are_refused(model: MixedModal) -> None:
    with pytest.raises(ValueError, match="several prompts to generate_batch"):
        model.generate([["a"], ["b"]])
    with pytest.raises(SequenceError, match="a text part is empty"):
        model.generate([""])
    with pytest.raises(ValueError, match="best_of compares images with the prompt's text, and the prompt has none"):
        model.generate([], best_of=2)
    with pytest.raises(TypeError, match="not int"):
        model.generate([3])
    with pytest.raises(SequenceError, match="too few for the output 'image'"):
        model.generate(["word " * 60])
    with pytest.raises(ValueError, match="continuation is empty"):
        model.log_likelihood(["a"], [])


def test_what_users_type_never_becomes_a_control_token(model: MixedModal) -> None:
    document = model.codec.to_document(["</s><break><mask:0>"])
    assert model.format.parse(model.format.spell(document)) == document


def test_the_codec_batches_pictures_in_order(model: MixedModal, picture: PIL.Image) -> None:
    pictures = [picture, picture.rotate(90), picture.convert("L"), picture.convert("RGBA").resize((64, 64))]
    model.codec.batch_size = 3
    together = model.codec.to_document([pictures[0], "and", *pictures[1:]])
    alone = [model.codec.to_document([one]).parts[0] for one in pictures]
    assert together.parts == (alone[0], Text("and"), *alone[1:])
    decoded = model.codec.from_document(together)
    assert [type(part) for part in decoded] == [PIL.Image, str, *[PIL.Image] * 3]
    assert same(decoded[2], model.codec.from_document(Document([alone[1]]))[0])


def test_a_hub_id_is_fetched_where_the_library_is_there(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, errors = types.ModuleType("huggingface_hub"), types.ModuleType("huggingface_hub.errors")
    wanted = []
    hub.snapshot_download = lambda source, **options: wanted.append((source, options)) or str(exported)
    errors.HfHubHTTPError = type("HfHubHTTPError", (Exception,), {})
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    assert MixedModal.from_pretrained("someone/model").model
    assert wanted == [("someone/model", {"revision": None, "allow_patterns": EXPORT_FILES})]
    MixedModal.from_pretrained("someone/model@v1")
    assert wanted[1][1]["revision"] == "v1"

    def fail(source: str, **options: object) -> str:
        raise errors.HfHubHTTPError("404")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(ExportError, match="no folder someone/model, and the Hugging Face hub does not give it: 404"):
        MixedModal.from_pretrained("someone/model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ExportError, match="install huggingface_hub"):
        MixedModal.from_pretrained("someone/model")
    with pytest.raises(ExportError, match="there is no folder /no/such/export; give one with an exported model"):
        MixedModal.from_pretrained("/no/such/export")


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        libraries = "deepspeed faiss diffusers gradio transformers peft huggingface_hub"
        if name.split(".")[0] in libraries.split():
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import mixmodal
assert not {"torch", "numpy", "PIL"} & set(sys.modules)
model = mixmodal.MixedModal.from_pretrained(sys.argv[1], device="cpu")
print(model.generate(["pear"], seed=1)[0].size)
"""


def test_a_model_loads_and_generates_without_the_optional_libraries(exported: Path) -> None:
    found = subprocess.run([sys.executable, "-c", BLOCKED, str(exported)], capture_output=True, text=True, timeout=120)
    assert found.stdout == "(16, 16)\n", found.stderr


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    import mixmodal

    with pytest.raises(AttributeError, match="no attribute 'Mixed'"):
        mixmodal.Mixed  # noqa: B018
