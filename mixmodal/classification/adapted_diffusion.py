"""How well a diffusion model denoises a picture under a mixture of classes: what Diffusion-TTA adapts a classifier by.

arXiv 2311.16102, section 3: the condition is the mean of the classes' embeddings, weighed by their probabilities.

Shapes: K classes, B draws of time and noise, C h w latents, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from PIL.Image import Image as Picture
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mixmodal.classification.adaptation import Conditions, Denoise
from mixmodal.classification.adapter_base import Adapter
from mixmodal.classification.diffusion import check_prompts, denoising_errors
from mixmodal.classification.templates import PLACE, fill
from mixmodal.tokenization.preprocessing import resize_and_crop, to_tensor


class DiffusionFeedback:
    """A diffusion model that reads texts, for an `AdaptedClassifier`; its text encoders are freed.

    Masks of tokens can not be mixed: all conditions have the union of the classes' masks, so that the padding of
    shorter names is read, too.

    Args:
        adapter: the model.
        classes: K names.
        template: the prompt, with `{}` for the class.
        batch_size: draws that the network sees at once. More are cut, and each piece is computed again for its
            gradient, so that memory does not grow with the draws.

    Attributes:
        embeddings: what the denoiser is told of each class, float32 `(K, ...)` each.

    Raises:
        ValueError: for a model that is told numbers of classes, or see `check_prompts`.
    """

    def __init__(self, adapter: Adapter, classes: Sequence[str], template: str = PLACE, batch_size: int = 32) -> None:
        if adapter.conditioned_on == "label":
            raise ValueError(
                "this denoiser is told numbers of classes, which can not be mixed; give one that reads texts"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        check_prompts(adapter, classes, [template])
        self.adapter, self.batch_size = adapter, batch_size
        found = adapter.encode_text([fill(template, one) for one in classes])
        adapter.free_text_encoders()
        self.embeddings = {name: one.float() for name, one in found.items() if one.is_floating_point()}
        self._masks = {
            name: one.bool().any(dim=0).to(one.dtype) for name, one in found.items() if not one.is_floating_point()
        }

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Of the noise of one draw: (C, h, w)."""
        return self.adapter.latent_shape

    def prepare(self, picture: Picture) -> Denoise:
        """An RGB picture of any size to the mean squared errors of its noise, `(B,)` of B draws."""
        x = self.adapter.encode_images(to_tensor(resize_and_crop(picture, self.adapter.image_size))[None])

        def denoise(conditions: Conditions, times: Tensor, noises: Tensor) -> Tensor:
            given = [times, noises, *conditions.values()]
            pieces = list(zip(*(one.split(self.batch_size) for one in given), strict=True))

            def errors(times: Tensor, noises: Tensor, *values: Tensor) -> Tensor:
                told = {name: one.to(self.adapter.dtype) for name, one in zip(conditions, values, strict=True)}
                told |= {name: one.expand(len(times), *one.shape) for name, one in self._masks.items()}
                return denoising_errors(self.adapter, x, noises, times.double().cpu().numpy(), told)

            if len(pieces) == 1:
                return errors(*pieces[0])
            # nothing is drawn in evaluation mode, so no state need be kept
            again = partial(checkpoint, errors, use_reentrant=False, preserve_rng_state=False)
            return torch.cat([again(*piece) for piece in pieces])

        return denoise
