"""A model that goes to a folder, and from there to the Hugging Face hub by the mixin of huggingface_hub."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmodal.hub import reason_of
from mixmodal.interop.adapter_files import tell_of
from mixmodal.interop.export import (
    CARD,
    EXPORT_FILES,
    IMAGE_TOKENIZER,
    TEXT_TOKENIZERS,
    ExportError,
    find_text_tokenizer,
    is_export,
    save_export,
)

if TYPE_CHECKING:
    from mixmodal.document import SequenceFormat
    from mixmodal.interop.adapters import Adapter
    from mixmodal.models.transformer import Transformer
    from mixmodal.tokenization.codec import Codec

    Mixin: Any = object
else:
    try:
        from huggingface_hub import ModelHubMixin as Mixin
    except ImportError:  # it is optional; `push_to_hub` says so

        class Mixin: ...


class HubModel(Mixin):
    """The mixin for what consists of a network and a codec; `from_pretrained` is the heir's own."""

    model: Transformer
    codec: Codec
    format: SequenceFormat
    folder: Path | None
    adapter: Adapter | None = None
    """That is in the weights, and not in those of `folder`."""

    def save_pretrained(self, folder: Path | str, *, config: None = None, model_card_kwargs: None = None) -> None:
        """Writes the exported folder, whole or not at all: weights as they are in memory, with their dtype.

        Tokenizers and model card are those of the folder that the model was loaded from, where there is one; the card
        gets the lines of front matter by which the hub lists it, where it lacks them.

        Args:
            folder: a new one, or one with an exported model, which is replaced.
            config, model_card_kwargs: of the mixin; they can not act, as both follow from the model.

        Raises:
            ExportError: where the folder holds anything else, which would be lost, or a file of a tokenizer is gone.
            OSError: where the disk is full; an older export is untouched then.
        """
        if config is not None or model_card_kwargs is not None:
            raise ValueError("config and model_card_kwargs can not act: both follow from the model; leave them out")
        folder = Path(folder)
        check_replaceable(folder)
        with tempfile.TemporaryDirectory() as made:
            source = self.folder or save_tokenizers(self.codec, Path(made))
            card = source / CARD
            text = card.read_text(encoding="utf-8") if card.is_file() else {}
            if self.adapter and isinstance(text, str):
                text = tell_of(self.adapter, text)
            images, is_tuned = source / IMAGE_TOKENIZER, self.codec.conversations
            save_export(folder, self.model, self.format, find_text_tokenizer(source), images, text, is_tuned)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Push a model of mixmodal",
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        delete_patterns: list[str] | str | None = None,
    ) -> str:
        """Uploads what `save_pretrained` writes to the Hugging Face hub in one commit; the commit's address.

        Args:
            repo_id: `OWNER/NAME`; it is made where there is none.
            commit_message: of the commit.
            private: whether the repository is to be private where it is made; None leaves it to the owner's settings.
            token: of an account that may write; None takes the one of `hf auth login`.
            branch: that is written to; None is the main one.
            create_pr: whether to open a pull request in its place.
            delete_patterns: files there that are removed in the same commit.

        Raises:
            ValueError: where huggingface_hub is not installed, or the hub does not take it.
        """
        if not hasattr(Mixin, "push_to_hub"):
            raise ValueError(f"to push a model to {repo_id}, install huggingface_hub: pip install huggingface_hub")
        from huggingface_hub.errors import HfHubHTTPError

        # a network that is down gives an error of the HTTP library, of which that of huggingface_hub is a kind
        kinds = [kind for kind in HfHubHTTPError.__bases__ if issubclass(kind, Exception)]
        problems: tuple[type[Exception], ...] = (OSError, *kinds)
        options: dict[str, Any] = {"private": private, "token": token, "branch": branch, "create_pr": create_pr}
        options |= {"commit_message": commit_message, "delete_patterns": delete_patterns}
        try:
            return super().push_to_hub(repo_id, **options)
        except problems as error:
            raise ValueError(f"the model can not be pushed to {repo_id}: {reason_of(error)}") from error


def check_replaceable(folder: Path) -> None:
    """Makes sure that nothing but an exported model is lost where a folder is replaced.

    Raises:
        ExportError: naming what else it holds.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ExportError(f"{folder} is not a folder; choose another")
    known = {Path(pattern).parts[0] for pattern in EXPORT_FILES}
    names = sorted(path.name for path in folder.iterdir())
    other = [name for name in names if not any(Path(name).match(pattern) for pattern in known)]
    if names and not other and not is_export(folder):
        other = names
    if other:
        raise ExportError(
            f"{folder} holds {other[0]}, which is not of an exported model and would be lost; choose another folder"
        )


def save_tokenizers(codec: Codec, folder: Path) -> Path:
    """Writes the tokenizers of a codec that was not loaded from a folder; the folder."""
    codec.text_tokenizer.save(folder / TEXT_TOKENIZERS[codec.text_tokenizer.suffix])
    codec.image_tokenizer.save(folder / IMAGE_TOKENIZER)
    return folder
