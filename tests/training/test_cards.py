"""Model cards of what is trained beside the transformer."""

from pathlib import Path

from mixmodal.training.cards import build_card, describe_batch
from mixmodal.training.config import TrainerConfig


def test_card_tells_data_scores_note_and_example():
    card = build_card(
        "Denoiser",
        "Trained for 3 steps.",
        [Path("runs/a"), Path("runs/b")],
        {"loss": "0.5"},
        ["x = 1"],
        library="diffusers",
        note="Mind this.",
    )
    assert card == (
        "---\nlibrary_name: diffusers\n---\n\n"
        "# Denoiser\n\nTrained for 3 steps.\n\n"
        "- trained on: `a`, `b`\n"
        "- the licences of the pictures it was trained on apply to what it is used for\n\n"
        "| held out | |\n|---|---|\n| loss | 0.5 |\n\n"
        "Mind this.\n\n"
        "```python\nx = 1\n```\n"
    )


def test_card_without_scores_has_no_table():
    card = build_card("Denoiser", "About.", [Path("a")], {}, ["x = 1"])
    assert card.startswith("# Denoiser\n")
    assert "held out" not in card


def test_batch_of_a_step():
    on_each = TrainerConfig(run_dir=Path("run"), max_steps=1, micro_batch_size=4, grad_accum_steps=2)
    in_all = TrainerConfig(run_dir=Path("run"), max_steps=1, micro_batch_size=4, global_batch_size=64)
    assert describe_batch(on_each, "pictures") == "8 pictures on each device"
    assert describe_batch(in_all, "pictures") == "64 pictures"
