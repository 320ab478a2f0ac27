"""What users import: a model with its tokenizers, and the commands that use one."""

from mixmodal.classification.likelihoods import LogLikelihood
from mixmodal.pipeline.mixed_modal import MixedModal

__all__ = ["LogLikelihood", "MixedModal"]
