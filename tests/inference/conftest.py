"""A vocabulary of 40 ids, both sequence formats, random networks over them, and plain loops that sample from these."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from mixmodal.document import Document, Image, Mask, SequenceFormat, Text, build_format
from mixmodal.models.transformer import Transformer, TransformerConfig
from mixmodal.sampling import engine
from mixmodal.sampling.engine import FREE, Request
from mixmodal.sampling.generator import SequenceGenerator
from mixmodal.sampling.grammar import Grammar, Template
from mixmodal.sampling.guidance import Guidance, build_streams
from mixmodal.sampling.rules import TokenSampling, build_rules, draw, penalise_repetition
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

GRID = (2, 3)


class Letters:
    """A text tokenizer of ten letters."""

    num_pieces = 10

    def encode(self, text: str) -> list[int]:
        return ["abcdefghij".index(letter) for letter in text]

    def decode(self, pieces: Sequence[int]) -> str:
        return "".join("abcdefghij"[piece] for piece in pieces)


@pytest.fixture(params=["cm3leon", "chameleon"])
def form(request: pytest.FixtureRequest) -> SequenceFormat:
    sizes = VocabularyConfig(codebook_sizes={"image": 16}, num_text_pieces=10, num_sentinels=6, num_reserved=2)
    return build_format(request.param, Vocabulary(sizes), {"image": GRID}, Letters())


@pytest.fixture
def build_model(form: SequenceFormat) -> Callable[..., Transformer]:
    def build(**options: object) -> Transformer:
        torch.manual_seed(0)
        sizes = {"dim": 32, "num_layers": 2, "num_heads": 4, "ffn_dim": 64, "max_seq_len": 48, "init_std": 0.3}
        return Transformer(TransformerConfig(vocab_size=form.vocabulary.size, **{**sizes, **options})).eval()

    return build


@pytest.fixture
def model(build_model: Callable[..., Transformer]) -> Transformer:
    return build_model()


@pytest.fixture
def image() -> Image:
    return Image(np.arange(6).reshape(GRID))


@pytest.fixture
def prompts(form: SequenceFormat, image: Image) -> list[np.ndarray]:
    """Unequal prompts that are open for an image."""
    documents = [[Text("abc")], [], [Text("j")], [Text("ab"), image, Text("cdefg")]]
    return [form.spell_prompt(Document(parts), "image") for parts in documents]


@pytest.fixture
def ask(form: SequenceFormat) -> Callable[..., list[Request]]:
    """Builds a request for each prompt, with seeds from 0 on; a scale adds a row in which a mask is all there is."""

    def build(
        generator: SequenceGenerator,
        prompts: Sequence[np.ndarray],
        output: str = "image",
        *,
        seeds: Sequence[int] | None = None,
        scale: float = 1.0,
        before: Sequence[np.ndarray] | None = None,
        max_new_tokens: int | None = None,
    ) -> list[Request]:
        masked = form.spell_prompt(Document([Mask(0)]), None if output == "mixed" else output)
        requests = []
        for row, prompt in enumerate(prompts):
            weight, streams = build_streams(Guidance(text_scale=scale), prompt, masked, masked)
            options = {"weight": weight, "streams": streams, "max_new_tokens": max_new_tokens}
            options |= {} if before is None else {"before": before[row]}
            requests.append(generator.request(prompt, row if seeds is None else seeds[row], output, **options))
        return requests

    return build


@pytest.fixture
def last_logits(model: Transformer) -> Callable[[np.ndarray], torch.Tensor]:
    """A function of ids `(T,)`: logits `(V,)` behind them, by one forward without cache."""

    @torch.no_grad()
    def compute(ids: np.ndarray) -> torch.Tensor:
        return model(torch.from_numpy(ids)[None])[0, -1]

    return compute


@pytest.fixture
def sample_plainly(form: SequenceFormat, last_logits: Callable[[np.ndarray], torch.Tensor]) -> Callable[..., list[int]]:
    """A function of a request and settings: its sample by whole forwards, without cache, batch or columns."""

    def sample(request: Request, sampling: Mapping[str, TokenSampling]) -> list[int]:
        known, rows, drawn = request.known, request.rows, []
        if known is None:
            grammar = Grammar(form, request.output, form.vocabulary.size)
            state = grammar.start([request.prompt], [request.room])
        else:
            grammar = Template(form, request.output)
            state = grammar.start([len(known)], [request.room])
        uniforms = torch.from_numpy(np.random.default_rng(request.seed).random(request.room))
        while int(state.nodes) != Grammar.done:
            modality = grammar.modality_at(int(state.nodes))
            logits = last_logits(rows[0])
            if modality and request.streams:
                others = (stream.weight * last_logits(row) for stream, row in zip(request.streams, rows[1:]))
                logits = request.weight * logits + sum(others)
            ids = torch.arange(len(logits))
            legal = form.vocabulary.contains(modality, ids) if modality else grammar.legal(state)[0]
            logits = logits.masked_fill(~legal, -torch.inf)[None]
            settings = sampling.get(modality or "text", TokenSampling())
            seen = torch.isin(ids, torch.from_numpy(rows[0]))[None]
            logits = penalise_repetition(logits, seen, settings.repetition_penalty)
            for rule in build_rules(settings):
                logits = rule(logits)
            token = int(grammar.settle(state, draw(logits, uniforms[len(drawn)][None])))
            drawn.append(token if known is None or known[len(drawn)] == FREE else int(known[len(drawn)]))
            rows = [np.append(row, drawn[-1]) for row in rows]
            state = grammar.advance(state, torch.tensor(drawn[-1:]))
        return drawn

    return sample


@pytest.fixture(scope="session", params=["cm3leon", "chameleon"])
def exported(request: pytest.FixtureRequest, tokenizers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an exported random model."""
    from mixmodal.interop.export import save_export
    from mixmodal.tokenization.text import TextTokenizer

    pieces = TextTokenizer.load(tokenizers / "text.model").num_pieces
    sizes = VocabularyConfig(codebook_sizes={"image": 75}, num_text_pieces=pieces, num_sentinels=8)
    form = build_format(request.param, Vocabulary(sizes), {"image": (4, 4)})
    torch.manual_seed(0)
    shape = {"dim": 32, "num_layers": 2, "num_heads": 4, "ffn_dim": 64, "max_seq_len": 96, "init_std": 0.3}
    model = Transformer(TransformerConfig(vocab_size=form.vocabulary.size, **shape))
    folder = tmp_path_factory.mktemp(request.param) / "run" / "export"
    card = {"title": "A test", "data": ["coloured shapes"], "attribution": "nobody", "figures": {"loss": 1.5}}
    save_export(folder, model, form, tokenizers / "text.model", tokenizers / "image", card)
    return folder


@pytest.fixture
def drawn_from(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Logits `(C,)` of each draw of one sample, as they come."""
    seen: list[torch.Tensor] = []

    def record(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        seen.append(logits[0])
        return draw(logits, uniforms)

    monkeypatch.setattr(engine, "draw", record)
    return seen


@pytest.fixture(scope="session")
def walk() -> Callable[..., list[np.ndarray]]:
    """Draws uniformly among the legal ids behind prompts until every row is done."""

    def walk(
        form: SequenceFormat, output: str, prompts: list[np.ndarray], rooms: list[int], seed: int
    ) -> list[np.ndarray]:
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

    return walk
