"""Our models for lm-evaluation-harness (extra `lm_eval`), under the name `mixmodal`; texts alone.

python -m mixmodal.pipeline.lm_eval_model --model mixmodal --model_args pretrained=runs/NAME/export --tasks piqa
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]

from mixmodal.pipeline.drawing_config import DTYPES
from mixmodal.pipeline.harness import TextHarness
from mixmodal.pipeline.mixed_modal import MixedModal


@register_model("mixmodal")
class MixedModalLM(LM):
    """An exported model as lm-evaluation-harness calls it; see `TextHarness`.

    Args:
        pretrained: folder of an exported model, or an id on the Hugging Face hub.
        device: `auto` takes the accelerator where there is one, and so does `cuda`, of which the harness says `cuda:0`
            where nothing is said.
        batch_size: sequences in one forward; the harness says 1 where nothing is said.
        dtype: of the weights: `stored`, `float32` or `bfloat16`.
        adapter: folder of an adapter of the model.
        max_batch_size: of the harness; it can not act, and must be left out.

    Raises:
        ValueError: for a batch size that is no number, or a dtype that there is not.
    """

    def __init__(
        self,
        pretrained: str,
        device: str = "auto",
        batch_size: int | str = 64,
        dtype: str = "stored",
        adapter: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if max_batch_size is not None or not str(batch_size).isdigit():
            raise ValueError(f"batch_size is {batch_size!r}; give a number, and no max_batch_size")
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; choose {', '.join(DTYPES)}")
        if device.startswith("cuda") and not torch.cuda.is_available():
            device = "cpu"  # the harness says cuda:0 where nobody has said anything
        model = MixedModal.from_pretrained(pretrained, device, DTYPES[dtype], int(batch_size), adapter)
        self.harness = TextHarness(model)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of requests with `args` `(context, continuation)`: nats, and whether greedy drawing gives the same."""
        return [(one.total, one.is_greedy) for one in self.harness.score([request.args for request in requests])]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Of requests with `args` `(text,)`: nats."""
        return self.harness.score_whole([request.args[0] for request in requests])

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Of requests with `args` `(context, options)`: what follows."""
        return self.harness.generate_until([request.args for request in requests])


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()
