"""The presets of released models: what is drawn from at each step, against plain functions that follow their code."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PIL

from mixmodal import MixedModal
from mixmodal.config import load_config
from mixmodal.document import EndOfTurn, LuminaFormat, SequenceFormat
from mixmodal.models.transformer import Transformer, TransformerConfig
from mixmodal.pipeline.generate import GenerateConfig
from mixmodal.tokenization.autoencoder import AutoencoderConfig
from mixmodal.tokenization.codec import Codec
from mixmodal.tokenization.image import ImageTokenizer, ImageTokenizerConfig
from mixmodal.tokenization.quantizer_base import QuantizerConfig
from mixmodal.tokenization.text import TextTokenizer
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

CONFIGS = Path(__file__).parents[2] / "configs" / "sample"
PENALTY, TEXT_TEMPERATURE, TOP_P = 1.2, 0.7, 0.9
TEXT_SCALE, IMAGE_SCALE = 3.0, 1.2
chameleons = pytest.mark.parametrize(("name", "temperature"), [("chameleon", 0.7), ("anole", 1.0)])
in_chameleon = pytest.mark.parametrize("exported", ["chameleon"], indirect=True)


def last_logits(model: MixedModal, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.model(torch.from_numpy(ids)[None])[0, -1].double().numpy()


def nucleus(logits: np.ndarray, allowed: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """Temperature and top-p among allowed ids: probabilities `(V,)`."""
    weights = np.where(allowed, np.exp((logits - logits[allowed].max()) / temperature), 0.0)
    probabilities = weights / weights.sum()
    order = np.argsort(-probabilities, kind="stable")
    kept = order[: int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1]
    result = np.zeros_like(probabilities)
    result[kept] = probabilities[kept] / probabilities[kept].sum()
    return result


def penalise(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The repetition penalty."""
    seen = np.isin(np.arange(len(logits)), ids)
    return np.where(seen, np.where(logits < 0, logits * PENALTY, logits / PENALTY), logits)


def assert_same(form: SequenceFormat, logits: torch.Tensor, expected: np.ndarray) -> None:
    """Recorded logits, of all columns or of codes alone, and probabilities `(V,)`."""
    found = np.zeros(len(expected))
    columns = slice(0, None) if len(logits) == len(expected) else list(form.vocabulary.ids("image"))
    found[columns] = logits.double().softmax(dim=0).numpy()
    assert (found > 0).tolist() == (expected > 0).tolist()
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)


def calm(model: MixedModal) -> MixedModal:
    """The same, less sure, so that a text does not end at once, but likes pictures."""
    with torch.no_grad():
        model.model.output.weight *= 0.4
        model.model.output.weight[model.format.vocabulary.break_] *= 6
    return model


def draw_ids(model: MixedModal, config: GenerateConfig, prompt: list, output: str, **options: object) -> np.ndarray:
    """The ids of one sample as the command draws it."""
    found: list[np.ndarray] = []
    generate = model.generator.generate

    def record(*arguments: object, **more: object) -> list[np.ndarray]:
        found.extend(generate(*arguments, **more))  # type: ignore[arg-type]
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.generator, "generate", record)
        model.generate(config.frame(prompt), output, **{**config.drawing_options(), **options})  # type: ignore[arg-type]
    return found[0]


@chameleons
@in_chameleon
def test_pictures_behind_texts_and_pictures_are_drawn_as_released(
    exported: Path, drawn_from: list[torch.Tensor], name: str, temperature: float
) -> None:
    config, model = load_config(GenerateConfig, CONFIGS / f"{name}.yaml"), MixedModal.from_pretrained(exported, "cpu")
    form, vocabulary = model.format, model.format.vocabulary
    picture = PIL.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    prompt = ["a red apple", picture, "pear"]
    # as the preset says where there are pictures
    drawn = draw_ids(model, config, prompt, "image", image_guidance_scale=IMAGE_SCALE)
    f = form.spell_prompt(model.codec.to_document(prompt), "image")
    codes = vocabulary.contains("image", np.arange(vocabulary.size))
    i = f[codes[f] | np.isin(f, [vocabulary.bos, vocabulary.break_, vocabulary.end_of_span])]
    u = np.array([vocabulary.bos, vocabulary.break_])
    assert len(drawn_from) == len(drawn) == 17
    for step in range(16):
        whole, pictures, nothing = (last_logits(model, np.append(row, drawn[:step])) for row in (f, i, u))
        logits = nothing + IMAGE_SCALE * (pictures - nothing) + TEXT_SCALE * (whole - pictures)
        assert_same(form, drawn_from[step], nucleus(logits, codes, temperature, TOP_P))
    assert drawn_from[16].isfinite().nonzero()[:, 0].tolist() == [vocabulary.end_of_span]  # it is forced


@chameleons
@in_chameleon
def test_texts_and_their_pictures_are_drawn_as_released(
    exported: Path, drawn_from: list[torch.Tensor], name: str, temperature: float
) -> None:
    config = load_config(GenerateConfig, CONFIGS / f"{name}.yaml")
    model = calm(MixedModal.from_pretrained(exported, "cpu"))
    vocabulary, limit = model.format.vocabulary, model.model.config.max_seq_len
    is_text, codes = (vocabulary.contains(kind, np.arange(vocabulary.size)) for kind in ("text", "image"))
    f = model.format.spell_prompt(model.codec.to_document(["a red apple"]), None)
    u, seen = np.array([vocabulary.bos]), set()
    for seed in range(3):
        drawn_from.clear()
        drawn, left = draw_ids(model, config, ["a red apple"], config.output, seed=seed), 0
        for step, token in enumerate(drawn.tolist()):
            whole = np.append(f, drawn[:step])
            if left > 1:
                f_logits, u_logits = (last_logits(model, row) for row in (whole, np.append(u, drawn[:step])))
                # without pictures in the prompt i is u, whatever its scale
                logits = u_logits + IMAGE_SCALE * (u_logits - u_logits) + TEXT_SCALE * (f_logits - u_logits)
                expected = nucleus(logits, codes, temperature, TOP_P)
            elif left == 1:
                expected = np.eye(vocabulary.size)[vocabulary.end_of_span]
            else:
                allowed = is_text.copy()
                allowed[[vocabulary.eos, vocabulary.break_]] = True, len(whole) + 18 <= limit
                expected = nucleus(penalise(last_logits(model, whole), whole), allowed, TEXT_TEMPERATURE, TOP_P)
            assert_same(model.format, drawn_from[step], expected)
            seen.add("image" if left > 1 else "text")
            left = 17 if token == vocabulary.break_ and not left else max(0, left - 1)
    assert seen == {"text", "image"}


SIZE = (96, 64)  # width and height; 3 x 2 units of one code each


@pytest.fixture
def lumina(tokenizers: Path) -> MixedModal:
    """A random model of 2,560 codes, more than the likeliest of which the preset draws."""
    shape = {"channels": 8, "channel_multipliers": (1, 1), "num_res_blocks": 1, "patch_size": 16, "norm_groups": 4}
    torch.manual_seed(0)
    images = ImageTokenizer(
        ImageTokenizerConfig(
            image_size=96,
            autoencoder=AutoencoderConfig(**shape, mid_blocks=("res",)),  # type: ignore[arg-type]
            quantizer=QuantizerConfig(levels=(8, 8, 8, 5)),
        )
    ).eval()
    text = TextTokenizer.load(tokenizers / "text.model")
    sizes = {"codebook_sizes": {"image": 2560}, "num_text_pieces": text.num_pieces, "num_sentinels": 4}
    vocabulary = Vocabulary(VocabularyConfig(**sizes, num_reserved=Vocabulary.reserved_for_sizes(4)))  # type: ignore[arg-type]
    network = {"dim": 32, "num_layers": 2, "num_heads": 4, "ffn_dim": 64, "max_seq_len": 160, "init_std": 0.3}
    model = Transformer(TransformerConfig(vocab_size=vocabulary.size, **network)).eval()  # type: ignore[arg-type]
    return MixedModal(model, Codec(text, images, LuminaFormat(vocabulary, {"image": (3, 3)}, codes_per_unit=1)))


@pytest.mark.parametrize("has_picture", [False, True])
def test_luminas_pictures_are_drawn_as_released(
    lumina: MixedModal, drawn_from: list[torch.Tensor], has_picture: bool
) -> None:
    config = replace(load_config(GenerateConfig, CONFIGS / "lumina-mgpt.yaml"), size="x".join(map(str, SIZE)))
    form, vocabulary, scale = lumina.format, lumina.format.vocabulary, 4.0
    picture = [PIL.new("RGB", (40, 10), "red")] if has_picture else []
    more = {"image_guidance_scale": scale} if has_picture else {}  # as the preset says
    drawn = draw_ids(lumina, config, [*picture, "a red apple"], config.output, **more)
    asked = "Generate an image of 96x64 according to the following prompt:\na red apple"
    document = lumina.codec.to_document([*picture, asked, EndOfTurn()])
    w, h = SIZE[0] // 32, SIZE[1] // 32
    sizes = [vocabulary.break_, vocabulary.size_token(h), vocabulary.size_token(w)]
    f = np.concatenate([form.spell_prompt(document, None), sizes])
    assert f.tolist()[-4] == vocabulary.end_of_turn
    u = np.array(sizes)  # no <s>
    assert len(drawn_from) == len(drawn) == h * (w + 1) + 1
    for k, token in enumerate(drawn.tolist()):
        if (k + 1) % (w + 1) == 0:
            assert token == vocabulary.newline  # forced, whatever was drawn
            continue
        if k + 1 == (w + 1) * h + 1:
            assert drawn_from[k].isfinite().nonzero()[:, 0].tolist() == [vocabulary.end_of_span] == [token]
            continue
        whole, bare = (last_logits(lumina, np.append(row, drawn[:k])) for row in (f, u))
        logits = np.where(vocabulary.contains("image", np.arange(len(whole))), bare + scale * (whole - bare), -np.inf)
        kept = np.argsort(-logits, kind="stable")[:2000]  # top-k, then temperature 1
        expected = np.zeros_like(logits)
        expected[kept] = np.exp(logits[kept] - logits.max())
        assert_same(form, drawn_from[k], expected / expected.sum())


def test_presets_say_what_they_are_for() -> None:
    for name in ("chameleon", "anole", "lumina-mgpt"):
        assert f"--config configs/sample/{name}.yaml" in (CONFIGS / f"{name}.yaml").read_text()
        assert load_config(GenerateConfig, CONFIGS / f"{name}.yaml").unconditional == "drop"
