"""What users import: a model with its tokenizers, and the commands that use one."""

from mixmodal.pipeline.mixed_modal import LogLikelihood, MixedModal

__all__ = ["LogLikelihood", "MixedModal"]
