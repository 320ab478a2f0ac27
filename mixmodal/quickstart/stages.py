"""`mixmodal quickstart`: the whole chain on the demo pictures, stage by stage, each resumable.

Nothing heavy is imported here: loading the libraries is part of the time that a run takes, and is counted.
"""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING, Any

from mixmodal.quickstart.chain import ENVIRONMENT, Chain, QuickstartConfig, progress_bar, say
from mixmodal.quickstart.recipe import ENCODER, ENTRIES, MEMORY, TOKENIZERS, TUNING, Recipe, config_path, load_recipe
from mixmodal.quickstart.runner import Stage, largest_memory_bytes, open_run, write_json
from mixmodal.records import flat

if TYPE_CHECKING:
    from mixmodal.pipeline import MixedModal
    from mixmodal.quickstart.demo import Demo


def quickstart(config: QuickstartConfig) -> None:
    """All stages of the chain, or of the tuning of what it has made.

    Raises:
        ValueError: where `out` holds something else, a package is missing, a config is wrong or a stage fails; finished
            stages are kept.
    """
    started = time.monotonic()
    open_run(config.out)
    if config.stage == "finetune":
        from mixmodal.quickstart.tuning import TuningChain, check_chain

        check_chain(config.out)
        entries, kind = TUNING, TuningChain
    else:
        entries, kind = ENTRIES, PretrainingChain
    chain = kind(config, load_recipe(config.out, config.recipe, config.num_processes, entries))
    chain.setup_seconds = time.monotonic() - started
    chain.runner.complete(say)
    say("\n" + "\n".join(f"{name + ':':<8} {path}" for name, path in chain.made.items()))


class PretrainingChain(Chain):
    """From pictures to a trained model and what it does."""

    def __init__(self, config: QuickstartConfig, recipe: Recipe) -> None:
        super().__init__(config, recipe)
        self._shared: tuple[MixedModal, Demo] | None = None
        self.made = {
            "report": self.run / "report.html",
            "figures": self.run / "summary.json",
            "model": self.export,
        }

    def _stages(self) -> list[Stage]:
        tokenizers = ("data", "text tokenizer", "image tokenizer")
        trained = ("data", "pretraining")
        shown = ("retrieval", "sampling", "classification")
        return [
            self._stage("data", self.build_data, ["data"], ["corpus"]),
            self._stage("text tokenizer", self.train_text_tokenizer, ["text_tokenizer"], ["text_tokenizer"], ("data",)),
            self._stage(
                "image tokenizer", self.train_image_tokenizer, ["image_tokenizer"], ["image_tokenizer"], ("data",)
            ),
            self._stage("token shards", self.write_tokens, ["tokens"], ["tokens"], tokenizers),
            self._stage("encoder", self.train_encoder, ["encoder"], ["encoder"], ("data",)),
            self._stage("memory", self.build_memory, [MEMORY], ["memory"], ("token shards", "encoder")),
            self._stage("retrieval", self.find, ["retrieval"], ["retrieval"], ("data", "memory")),
            self._stage("pretraining", self.pretrain, ["pretrain", "export"], ["pretrain"], ("token shards",)),
            self._stage("sampling", self.sample, ["samples"], ["samples"], trained),
            self._stage("classification", self.classify, ["classification"], ["classes"], trained),
            self._stage("report", self.report, ["report.html", "summary.json"], [], shown),
        ]

    # what is trained

    def build_data(self) -> None:
        """Shards of the demo pictures."""
        from mixmodal.quickstart.corpus import build_demo_corpus

        with progress_bar("pictures") as progress:
            corpus = build_demo_corpus(self.recipe.configs["corpus"], self.run / "data", progress)
        say("      " + ", ".join(f"{name} {count:,}" for name, count in corpus.counts.items()))

    def train_text_tokenizer(self) -> None:
        """BPE on the captions."""
        from mixmodal.training.text_tokenizer import train_text_tokenizer_on_shards

        train_text_tokenizer_on_shards(self.recipe.configs["text_tokenizer"])

    def train_image_tokenizer(self) -> None:
        """Trains in a process of its own, as the printed command does, and scores what came out."""
        from mixmodal.quickstart.launch import launch, mixmodal_command
        from mixmodal.quickstart.tokenizer_scores import score_tokenizer

        launch(mixmodal_command("train-image-tokenizer", "--config", str(config_path(self.run, "image_tokenizer"))))
        self._need(TOKENIZERS["image_tokenizer"], "the training of the image tokenizer")
        score_tokenizer(self.run, self.run / TOKENIZERS["image_tokenizer"])

    def write_tokens(self) -> None:
        """Token shards of the training pairs, and of the held-out ones for the held-out loss."""
        from mixmodal.quickstart.tokens import write_token_shards

        with progress_bar("shards") as progress:
            write_token_shards(self.run, self.recipe.configs["tokens"], progress)

    def train_encoder(self) -> None:
        """A two-tower encoder, in a process of its own."""
        from mixmodal.quickstart.launch import launch, mixmodal_command

        launch(mixmodal_command("train-encoder", "--config", str(config_path(self.run, "encoder"))))
        self._need(ENCODER, "the training of the encoder")

    def build_memory(self) -> None:
        """Vectors and tokens of the training documents."""
        from mixmodal.data.indexing import build_memory

        build_memory(self.recipe.configs["memory"])

    def pretrain(self) -> None:
        """Through the deepspeed launcher; the exported model is copied to `export/`."""
        self._launch("pretrain", "pretrain/export", "the pretraining")
        shutil.rmtree(self.export, ignore_errors=True)
        shutil.copytree(self.run / "pretrain" / "export", self.export)

    # what is made with the trained model

    def _model_and_demo(self) -> tuple[MixedModal, Demo]:
        if self._shared is None:
            from mixmodal.pipeline import MixedModal
            from mixmodal.quickstart.demo import load_demo

            model = MixedModal.from_pretrained(self.export)
            config = model.codec.image_tokenizer.config
            train, heldout = self.run / "data" / "train", self.run / "data" / "heldout"
            self._shared = model, load_demo(train, heldout, config.image_size, config.preprocess)
        return self._shared

    def find(self) -> None:
        """What held-out pairs find in the memory."""
        from mixmodal.quickstart.demo import load_demo
        from mixmodal.quickstart.finding import find_for_heldout

        config, encoder = self.recipe.configs["retrieval"], self.recipe.configs["encoder"].model
        folders = (self.run / "data" / "train", self.run / "data" / "heldout")
        demo = load_demo(*folders, encoder.image_size, "transformers")
        shards = self.recipe.configs["memory"].shards
        results = find_for_heldout(self.run, demo, shards, self.run / MEMORY, self.run / ENCODER, config)
        write_json(self.run / "retrieval" / "results.json", results)

    def sample(self) -> None:
        """Pictures from captions, captions from pictures, and a document of both."""
        from mixmodal.quickstart.samples import sample_demo

        model, demo = self._model_and_demo()
        results = sample_demo(self.run, model, demo, self.recipe.configs["samples"])
        write_json(self.run / "samples" / "results.json", {**results, "counts": demo.counts()})

    def classify(self) -> None:
        """Held-out pictures among captions."""
        from mixmodal.quickstart.classes import classify_heldout

        model, demo = self._model_and_demo()
        results = classify_heldout(self.run, model, demo, self.recipe.configs["classes"])
        write_json(self.run / "classification" / "results.json", results)

    # what is told about it

    def report(self) -> None:
        """`summary.json` and `report.html`."""
        from mixmodal.quickstart.report import write_report

        started = time.monotonic()
        markers = self.runner.markers(skip=["report"])
        summary = self._summary(markers)
        summary["seconds"] = self.setup_seconds + sum(marker["seconds"] for marker in markers)
        write_report(self.run, summary, markers)
        summary["seconds"] += time.monotonic() - started
        write_json(self.run / "summary.json", summary)
        for name, value in flat(summary):
            if isinstance(value, float):
                say(f"      {name:<45} {value:,.3f}")

    def _summary(self, markers: list[dict[str, Any]]) -> dict[str, Any]:
        from mixmodal.evaluation.concepts import Rate
        from mixmodal.quickstart.finding import summarise_finding
        from mixmodal.quickstart.report import median_of, read_json, read_metrics
        from mixmodal.quickstart.samples import summarise_samples

        samples = read_json(self.run / "samples" / "results.json")
        classes = read_json(self.run / "classification" / "results.json")
        methods = ("image_given_text", "text_given_image")
        metrics = read_metrics(self.run / "pretrain" / "metrics.jsonl")
        return {
            "seconds": 0.0,
            "peak_memory_bytes": max(largest_memory_bytes(), *(marker["peak_memory_bytes"] for marker in markers)),
            "tokenizer": read_json(self.run / "image_tokenizer" / "scores.json"),
            "retrieval": summarise_finding(read_json(self.run / "retrieval" / "results.json")),
            **summarise_samples(samples),
            "classification": {
                **{f"{name}_heldout": Rate(classes[name]["hits"], classes[name]["trials"]).share for name in methods},
                "num_candidates": classes["num_candidates"],
                "pictures": classes[methods[0]]["trials"],
            },
            "tokens_per_second_train": median_of(metrics, "tokens_per_second"),
            "tokens_per_second_generate": samples["tokens_per_second"],
            **read_json(self.run / "pretrain" / ENVIRONMENT),
            "counts": samples["counts"],
            "stages": {marker["name"]: marker["seconds"] for marker in markers},
        }
