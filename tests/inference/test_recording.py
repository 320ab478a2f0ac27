"""Steps that are recorded once and replayed draw what steps draw that are taken one by one."""

from collections.abc import Callable

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from mixmodal.document import Document, LuminaFormat, Mask, SequenceFormat, Text, build_format
from mixmodal.models.transformer import Transformer, TransformerConfig
from mixmodal.sampling import engine as engines
from mixmodal.sampling.engine import Engine, Request
from mixmodal.sampling.generator import SequenceGenerator
from mixmodal.sampling.guidance import Guidance, build_streams
from mixmodal.sampling.rules import TokenSampling
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

SETTINGS = {"text": TokenSampling(temperature=1.5), "image": TokenSampling(top_k=12, repetition_penalty=0.8)}
GUIDANCE = Guidance(text_scale=3.0)


class Recorder:
    """Does what a CUDA graph does: all but the tensors is as it was when recorded, which changes no tensor itself."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.slots: list[int] = []
        self.replayed = 0

    @property
    def tensors(self) -> list[torch.Tensor]:
        assert self.engine is not None
        found = [value for value in vars(self.engine).values() if isinstance(value, torch.Tensor)]
        return [*found, *self.engine.state, *(kept for layer in self.engine.cache.layers for kept in layer)]

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        before = [one.clone() for one in self.tensors]
        graph = make_fx(step)()
        for one, then in zip(self.tensors, before, strict=True):
            one.copy_(then)
        assert self.engine is not None
        self.slots.append(self.engine.cache.used)

        def replay() -> None:
            self.replayed += 1
            graph()

        return replay


@pytest.fixture
def form(form: SequenceFormat) -> SequenceFormat:
    """Larger pictures than those of the other tests."""
    return build_format(form.name, form.vocabulary, {"image": (4, 6)}, form.text_tokenizer)


@pytest.fixture
def model(build_model: Callable[..., Transformer]) -> Transformer:
    return build_model(num_layers=1, num_heads=1)


@pytest.fixture(autouse=True)
def short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "SPAN", 8)
    monkeypatch.setattr(engines, "LEAST_STEPS", 4)


@pytest.fixture
def queue(form: SequenceFormat, model: Transformer) -> list[Request]:
    """Pictures with and without guidance, behind prompts of several lengths, and a text with pictures."""
    generator = SequenceGenerator(model, form)
    prompts = [form.spell_prompt(Document([Text(text)]), "image") for text in ("a", "bcdefg", "cd")]
    without = form.spell_prompt(Document([]), "image")
    asked = []
    for seed, prompt in enumerate(prompts):
        weight, streams = build_streams(GUIDANCE, prompt, without, without) if seed != 1 else (1.0, ())
        asked.append(generator.request(prompt, seed, "image", weight=weight, streams=streams))
    return [*asked, generator.request(form.spell_prompt(Document([]), None), 7, "mixed")]


@pytest.fixture
def lumina() -> LuminaFormat:
    """Pictures of up to 16 codes in several sizes."""
    reserved = Vocabulary.reserved_for_sizes(8)
    sizes = VocabularyConfig(codebook_sizes={"image": 16}, num_text_pieces=10, num_sentinels=6, num_reserved=reserved)
    return LuminaFormat(Vocabulary(sizes), {"image": (4, 4)}, codes_per_unit=1)


def draw(
    model: Transformer, form: SequenceFormat, queue: list[Request], record: Recorder | None = None, **options: int
) -> list:
    engine = Engine(
        model,
        form,
        num_slots=2,
        num_rows=4,
        length=model.config.max_seq_len,
        sampling=SETTINGS,
        guidance=GUIDANCE,
        record=record,
        **options,
    )
    if record is not None:
        record.engine = engine
    waiting, found = list(enumerate(queue))[::-1], [[] for _ in queue]
    while waiting or len(engine):
        if added := [waiting.pop() for _ in range(min(len(waiting), 2 - len(engine)))]:
            engine.add(added)
        for progress in engine.advance():
            found[progress.number] += progress.ids.tolist()
    return found


def test_replayed_steps_draw_what_single_steps_draw(
    form: SequenceFormat, model: Transformer, queue: list[Request]
) -> None:
    record = Recorder()
    assert draw(model, form, queue, record) == draw(model, form, queue)
    assert record.replayed > 30
    assert all(slots % 8 == 0 for slots in record.slots)
    assert len(set(record.slots)) > 1  # a picture goes over several stretches


def test_steps_between_looks_go_on_with_the_same_record(
    form: SequenceFormat, model: Transformer, queue: list[Request]
) -> None:
    whole, pieces = Recorder(), Recorder()
    expected = draw(model, form, queue[:1], whole)
    assert draw(model, form, queue[:1], pieces, chunk=5) == expected
    assert len(pieces.slots) == len(whole.slots)


def test_steps_are_not_recorded_where_there_is_no_graph(form: SequenceFormat, model: Transformer) -> None:
    generator = SequenceGenerator(model, form)
    for options in ({"cuda_graphs": True}, {"compile": True}):
        with pytest.raises(ValueError, match=r"for a CUDA device, not for cpu"):
            generator.accelerate(**options)
    generator.accelerate()
    assert generator.record is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False")
@pytest.mark.parametrize("options", [{"cuda_graphs": True}, {"cuda_graphs": True, "compile": True}])
def test_cuda_graphs_draw_what_single_steps_draw(
    form: SequenceFormat, model: Transformer, queue: list[Request], options: dict[str, bool]
) -> None:
    generator = SequenceGenerator(model.to("cuda"), form, batch_size=2)
    expected = generator.generate(queue, SETTINGS, GUIDANCE)
    generator.accelerate(**options)
    found = generator.generate(queue, SETTINGS, GUIDANCE)
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected]


def test_replayed_steps_draw_pictures_of_several_sizes(lumina: LuminaFormat) -> None:
    torch.manual_seed(0)
    shape = {"dim": 32, "num_layers": 1, "num_heads": 1, "ffn_dim": 64, "max_seq_len": 48, "init_std": 0.3}
    model = Transformer(TransformerConfig(vocab_size=lumina.vocabulary.size, **shape)).eval()  # type: ignore[arg-type]
    generator, record, queue = SequenceGenerator(model, lumina), Recorder(), []
    for seed, grid in enumerate([(4, 4), (2, 8), (8, 2), None]):
        prompt = lumina.spell_prompt(Document([Mask(0)]), "image", grid)
        without = lumina.spell_prompt(Document([]), "image", grid)
        weight, streams = build_streams(GUIDANCE, prompt, without, without, bare=True)
        queue.append(generator.request(prompt, seed, "image", weight=weight, streams=streams))
    replayed = draw(model, lumina, queue, record)
    assert replayed == draw(model, lumina, queue)
    assert record.replayed > 15
    for request, ids in zip(queue, replayed):
        lumina.split([*request.prompt.tolist(), *ids, lumina.vocabulary.eos])  # type: ignore[arg-type]
