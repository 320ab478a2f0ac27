"""Codes a second of drawing pictures with classifier-free guidance: ours, transformers' Chameleon, and the bound.

    python benchmarks/decode.py [--shape 100m] [--batch_sizes 1 8] [--turns 3] [--precision float32] [--cuda_graphs]
    python benchmarks/decode.py --shape tiny --imported

- ours: `SequenceGenerator`, the prompt and the prompt without its text as two rows of one batch.
- transformers: `ChameleonForConditionalGeneration.generate` with the same weights and prompts, `guidance_scale` and
  `negative_prompt_ids` of `generate`, which take a second forward with a cache of its own a step, and a logits
  processor that leaves the columns of the codes. transformers forbids the codes that its `vocabulary_map` names; the
  map of this network names none, so nothing is forbidden. Prompts are of one length: it needs no padding.
- no cache: a plain loop over our network, which computes all tokens again for each code; for small pictures only.
- the bound: what a step must read (each matrix once, the columns of the codes, keys and values of all rows at half
  of the picture) at the rate of a large copy (bytes read and written).
- a mixed batch: half of the samples write text, half draw pictures, against both halves one after the other.

Before anything is timed, logits of both networks are compared on random tokens, and a few codes are drawn with
temperature 0 (the share of equal ones is recorded). Timed codes are drawn with temperature 1 from all codes. Subjects
take turns in one process; nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from documents import FORMAT, SHAPE
from record import record
from torch import Tensor
from train_throughput import SHAPES as TRAINING_SHAPES
from train_throughput import build_peer

from mixmodal.document import CM3LeonFormat, SequenceFormat
from mixmodal.interop.chameleon.conversion import export_tensors
from mixmodal.interop.chameleon.layouts import TRANSFORMERS
from mixmodal.interop.export import load_transformer
from mixmodal.interop.importing import ImportConfig, import_checkpoint
from mixmodal.models.presets import PRESETS
from mixmodal.models.transformer import Transformer, TransformerConfig
from mixmodal.sampling.engine import Request
from mixmodal.sampling.generator import SequenceGenerator
from mixmodal.sampling.guidance import Guidance, build_streams
from mixmodal.sampling.rules import TokenSampling
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

CODEBOOK_SIZE, SCALE, PROMPT_PIECES = 8192, 3.0, 8
GUIDANCE = Guidance(text_scale=SCALE)
GREEDY, DRAWN = TokenSampling(temperature=0.0), TokenSampling()
SHORT_GRID = (4, 8)
"""Of the pictures that are drawn without a cache."""


class Subject(NamedTuple):
    """A network and the pictures that it draws."""

    config: TransformerConfig
    format: SequenceFormat


def build_subject(shape: str) -> Subject:
    """The network's config and the format of a shape."""
    if shape == "demo":
        return Subject(TransformerConfig(vocab_size=FORMAT.vocabulary.size, **SHAPE), FORMAT)
    if shape == "tiny":
        sizes = {"vocab_size": 128, "dim": 32, "num_layers": 2, "num_heads": 4, "ffn_dim": 48}
        return Subject(TransformerConfig(**sizes, max_seq_len=96), build_format(128, 64, (4, 4)))
    if shape == "100m":
        sizes = {"vocab_size": 65536, "dim": 768, "num_layers": 12, "num_heads": 12, "ffn_dim": 2048}
        return Subject(TransformerConfig(**sizes, max_seq_len=512), build_format(65536, CODEBOOK_SIZE, (16, 16)))
    config = PRESETS["chameleon_7b"] if shape == "7b" else TransformerConfig(**TRAINING_SHAPES[shape].model)
    config = TransformerConfig(**{**vars(config), "max_seq_len": 2048, "dropout": 0.0})
    return Subject(config, build_format(config.vocab_size, CODEBOOK_SIZE, (32, 32)))


def build_format(vocab_size: int, codebook_size: int, grid: tuple[int, int]) -> SequenceFormat:
    """A format of pictures of `grid` over a vocabulary of `vocab_size`, filled up with pieces of text."""
    sizes = {"codebook_sizes": {"image": codebook_size}, "num_sentinels": 8}
    others = Vocabulary(VocabularyConfig(**sizes, num_text_pieces=1)).size - 1
    return CM3LeonFormat(Vocabulary(VocabularyConfig(**sizes, num_text_pieces=vocab_size - others)), {"image": grid})


def peer_weights(model: Transformer) -> dict[str, Tensor]:
    """The tensors of our network under the names of transformers' Chameleon."""
    state = model.state_dict()
    found = dict(export_tensors(TRANSFORMERS, model.config, state.__getitem__, 1))
    return {TRANSFORMERS.output: state["embedding.weight"], **found}


def import_networks(subject: Subject, device: torch.device, options: argparse.Namespace) -> tuple[Transformer, Any]:
    """Ours by `mixmodal import` of a folder that transformers wrote, and transformers' from the same folder."""
    from transformers import ChameleonForConditionalGeneration

    with tempfile.TemporaryDirectory() as name:
        theirs, ours = Path(name) / "theirs", Path(name) / "ours"
        torch.manual_seed(0)
        build_peer(subject.config).save_pretrained(theirs)
        import_checkpoint(ImportConfig(source=theirs, out=ours))
        model = load_transformer(ours, device, getattr(torch, options.precision))
        peer = ChameleonForConditionalGeneration.from_pretrained(theirs, dtype=getattr(torch, options.peer_precision))
    return model, peer.to(device).eval()  # type: ignore[arg-type]


def build_networks(subject: Subject, device: torch.device, options: argparse.Namespace) -> tuple[Transformer, Any]:
    """Ours and transformers', of the same random weights."""
    if options.imported:
        return import_networks(subject, device, options)
    torch.manual_seed(0)
    model = Transformer(subject.config).to(device, getattr(torch, options.precision)).eval()
    if options.alone:
        return model, None
    with device:
        peer = build_peer(subject.config).to(getattr(torch, options.peer_precision)).eval()
    peer.load_state_dict(peer_weights(model))
    return model, peer


@torch.inference_mode()
def difference(model: Transformer, peer: Any) -> float:
    """The largest between logits of both on random tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(6, model.config.vocab_size, (2, 16), generator=generator).to(model.embedding.weight.device)
    return (model(tokens) - peer(input_ids=tokens, use_cache=False).logits.float()).abs().max().item()


# the subjects: each draws once and gives the codes


def prompts(format: SequenceFormat, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts `(B, T)` of random pieces of text, and the same without them, both open for a picture."""
    vocabulary = format.vocabulary
    pieces = np.random.default_rng(0).choice(vocabulary.ids("text"), (batch_size, PROMPT_PIECES))
    whole = [np.array([vocabulary.bos, *row, vocabulary.break_]) for row in pieces]
    return np.stack(whole), np.array([[vocabulary.bos, vocabulary.sentinel(0), vocabulary.break_]] * batch_size)


def build_requests(generator: SequenceGenerator, batch_size: int) -> list[Request]:
    requests = []
    for seed, (whole, without) in enumerate(zip(*prompts(generator.format, batch_size))):
        weight, streams = build_streams(GUIDANCE, whole, without, without)
        requests.append(generator.request(whole, seed, "image", weight=weight, streams=streams))
    return requests


def draw_ours(generator: SequenceGenerator, batch_size: int, sampling: TokenSampling = DRAWN) -> np.ndarray:
    """Codes `(B, n)` as ids."""
    found = generator.generate(build_requests(generator, batch_size), {"image": sampling}, GUIDANCE)
    return np.stack(found)


def draw_theirs(peer: Any, format: SequenceFormat, batch_size: int, sampling: TokenSampling = DRAWN) -> np.ndarray:
    """Codes `(B, n)` as ids."""
    from transformers import LogitsProcessorList

    device, codes = peer.lm_head.weight.device, format.vocabulary.ids("image")
    whole, without = (torch.from_numpy(part).to(device) for part in prompts(format, batch_size))

    def keep_codes(tokens: Tensor, scores: Tensor) -> Tensor:
        kept = torch.full_like(scores, -torch.inf)
        kept[:, codes.start : codes.stop] = scores[:, codes.start : codes.stop]
        return kept

    with torch.inference_mode():
        found = peer.generate(
            whole,
            attention_mask=torch.ones_like(whole),
            **({"do_sample": True, "top_k": 0} if sampling.temperature else {"do_sample": False}),
            max_new_tokens=format.blocks["image"].length,
            guidance_scale=SCALE,
            negative_prompt_ids=without,
            logits_processor=LogitsProcessorList([keep_codes]),
            use_cache=True,
            eos_token_id=None,
            pad_token_id=format.vocabulary.pad,
        )
    return found[:, whole.shape[1] :].cpu().numpy()


@torch.inference_mode()
def draw_uncached(model: Transformer, format: SequenceFormat, batch_size: int) -> np.ndarray:
    """Codes `(B, n)` as ids."""
    codes = format.vocabulary.ids("image")
    rows = [torch.from_numpy(part).to(model.embedding.weight.device) for part in prompts(format, batch_size)]
    for _ in range(format.blocks["image"].length):
        whole, without = (model.logits(model.hidden(part)[:, -1], slice(codes.start, codes.stop)) for part in rows)
        new = (without + SCALE * (whole - without)).softmax(dim=1).multinomial(1) + codes.start
        rows = [torch.cat((part, new), dim=1) for part in rows]
    return rows[0][:, -format.blocks["image"].length :].cpu().numpy()


def mixed_ratio(generator: SequenceGenerator, batch_size: int) -> float:
    """Tokens a second of a batch of texts and pictures over those of the texts and the pictures one after the other."""
    half = batch_size // 2
    pictures = build_requests(generator, half)
    length = generator.format.blocks["image"].length
    starts = prompts(generator.format, half)[0][:, :-1]
    texts = [generator.request(row, seed, "text", max_new_tokens=length) for seed, row in enumerate(starts)]
    speeds = []
    for batches in ([texts + pictures], [texts, pictures]):
        started = time.perf_counter()
        tokens = sum(len(ids) for batch in batches for ids in generator.generate(batch, None, GUIDANCE))
        speeds.append(tokens / (time.perf_counter() - started))
    return speeds[0] / speeds[1]


# the bound


def copy_rate(device: torch.device, num_bytes: int = 1 << 29) -> float:
    """Bytes read and written a second by a large copy: the best of five."""
    source, seconds = torch.zeros(num_bytes, dtype=torch.uint8, device=device), []
    target = torch.ones_like(source)
    for _ in range(5):
        seconds.append(timed(lambda: target.copy_(source), device))
    return 2 * num_bytes / min(seconds)


def step_bytes(model: Transformer, format: SequenceFormat, batch_size: int) -> int:
    """What a step with guidance must read at least, keys and values as of half a picture."""
    weight, sizes = model.embedding.weight, model.config.attention_sizes
    matrices = sum(part.numel() for part in model.blocks.parameters())
    columns = len(format.vocabulary.ids("image")) * model.config.dim
    tokens = sum(part.shape[1] for part in prompts(format, 1)) + format.blocks["image"].length  # of both rows
    kept = 2 * model.config.num_layers * sizes["num_kv_heads"] * sizes["head_dim"] * tokens * batch_size
    return (matrices + columns + kept) * weight.element_size()


def timed(draw: Callable[[], Any], device: torch.device) -> float:
    """Seconds that it takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    draw()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


# the comparison


class Comparison:
    """Measures one shape at several batch sizes."""

    def __init__(self, options: argparse.Namespace, write: Callable[..., Any] = record) -> None:
        self.options, self.write = options, write
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.subject = build_subject(options.shape)
        self.model, self.peer = build_networks(self.subject, self.device, options)
        self.generator = SequenceGenerator(self.model, self.subject.format, batch_size=1 << 20)
        self.generator.accelerate(cuda_graphs=options.cuda_graphs, compile=options.compile)
        self.ours, self.theirs = f"ours, {options.precision}{self.how}", f"transformers, {options.peer_precision}"

    @property
    def how(self) -> str:
        """What ours is launched by, where it is not kernel by kernel."""
        return ", compiled" * self.options.compile + ", CUDA graphs" * self.options.cuda_graphs

    def check(self) -> None:
        """Compares logits and the codes of temperature 0, and records the share of equal ones.

        Raises:
            SystemExit: where logits differ by more than rounding.
        """
        worst = difference(self.model, self.peer)
        is_exact = self.options.precision == self.options.peer_precision == "float32"
        if worst > (1e-3 if is_exact else 0.3):
            raise SystemExit(f"the logits of both networks differ by {worst}")
        found = draw_ours(self.generator, 1, GREEDY), draw_theirs(self.peer, self.subject.format, 1, GREEDY)
        if found[0].shape != found[1].shape:
            raise SystemExit(f"{found[0].shape} and {found[1].shape} codes were drawn")
        self.put(
            1,
            "equal codes of ours and transformers at temperature 0",
            [100 * float(np.mean(found[0] == found[1]))],
            "%",
        )

    def put(
        self, batch_size: int, what: str, values: Sequence[float], unit: str, format: SequenceFormat | None = None
    ) -> None:
        """Records values of one subject."""
        settings = {
            **{name: value for name, value in vars(self.subject.config).items() if isinstance(value, int)},
            "codes": (format or self.subject.format).blocks["image"].length,
            "batch_size": batch_size,
            "guidance": SCALE,
            "num_threads": torch.get_num_threads(),
        }
        shape = f"{self.options.shape}{', imported' * self.options.imported}"
        label = f"{shape}, batch of {batch_size}: {what}"
        self.write("decode", label, values, unit, self.device.type, settings)

    def compare(self, batch_size: int) -> None:
        """Speeds of all subjects in turns, their ratios and the bound."""
        form = self.subject.format
        subjects: dict[str, Callable[[], np.ndarray]] = {self.ours: lambda: draw_ours(self.generator, batch_size)}
        if self.peer is not None:
            subjects[self.theirs] = lambda: draw_theirs(self.peer, form, batch_size)
        speeds = self.take_turns(subjects, batch_size * form.blocks["image"].length)
        for name, values in speeds.items():
            self.put(batch_size, name, values, "codes/s")
        if self.peer is not None:
            ratios = [ours / theirs for ours, theirs in zip(speeds[self.ours], speeds[self.theirs])]
            self.put(batch_size, f"speed of {self.ours} over {self.theirs}", ratios, "times")
        bound = batch_size * copy_rate(self.device) / step_bytes(self.model, form, batch_size)
        self.put(batch_size, f"bound by memory, {self.options.precision}", [bound], "codes/s")
        shares = [100 * value / bound for value in speeds[self.ours]]
        self.put(batch_size, f"{self.ours}, of the bound by memory", shares, "%")

    def compare_uncached(self) -> None:
        """A loop without a cache, and ours, for small pictures."""
        form = CM3LeonFormat(self.subject.format.vocabulary, {"image": SHORT_GRID})
        generator, size = SequenceGenerator(self.model, form), form.blocks["image"].length
        subjects = {"ours": lambda: draw_ours(generator, 1), "no cache": lambda: draw_uncached(self.model, form, 1)}
        for name, values in self.take_turns(subjects, size).items():
            self.put(1, f"{name}, {self.options.precision}, pictures of {size} codes", values, "codes/s", form)

    def compare_mixed(self, batch_size: int) -> None:
        """Texts and pictures in one batch over the two apart."""
        if batch_size < 2:
            return
        ratios = [mixed_ratio(self.generator, batch_size) for _ in range(self.options.turns)]
        self.put(
            batch_size, f"half texts in one batch over both apart, {self.options.precision}{self.how}", ratios, "times"
        )

    def take_turns(self, subjects: dict[str, Callable[[], np.ndarray]], num_codes: int) -> dict[str, list[float]]:
        """Codes a second of each subject in each turn, after one turn that does not count on a GPU."""
        for draw in subjects.values() if self.device.type == "cuda" else ():
            draw()
        found: dict[str, list[float]] = {name: [] for name in subjects}
        for _ in range(self.options.turns):
            for name, draw in subjects.items():
                found[name].append(num_codes / timed(draw, self.device))
        return found


def main(options: argparse.Namespace) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    comparison = Comparison(options, print if options.dry else record)
    if comparison.peer is not None:
        comparison.check()
    comparison.compare_uncached()
    for batch_size in options.batch_sizes:
        try:
            comparison.compare(batch_size)
            comparison.compare_mixed(batch_size)
        except torch.cuda.OutOfMemoryError:
            print(f"a batch of {batch_size} does not fit into the memory of the GPU")
            break


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=["tiny", "demo", "100m", "1b", "7b"], default="100m")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of ours")
    parser.add_argument("--peer_precision", choices=["float32", "bfloat16"], default="float32", help="of transformers")
    parser.add_argument("--cuda_graphs", action="store_true", help="ours launches each step as one graph")
    parser.add_argument("--compile", action="store_true", help="ours runs compiled blocks")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    parser.add_argument("--imported", action="store_true", help="ours is what `mixmodal import` makes of transformers'")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves them alone")
    parser.add_argument("--dry", action="store_true", help="print instead of recording")
    return parser


if __name__ == "__main__":
    main(build_parser().parse_args())
