"""Folders of parts that are written one after the other, each whole or not at all, and the manifest after each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixmodal.manifests import write_manifest


class PartsWriter(ABC):
    """What the writers of memories and of candidates share: they go on with what a folder holds.

    Attributes:
        folder: of the parts.
        manifest: as it stands in the folder, or will with the first part.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def parts(self) -> list[dict[str, Any]]:
        """The manifest's entries of the parts that are there, in order."""
        return self.manifest["parts"]

    def is_whole(self, number: int) -> bool:
        """Whether a part is there as it was written; a damaged one is not, and can be written again."""
        if number >= len(self.parts):
            return False
        try:
            self._check_part(self.parts[number])
        except ValueError:
            return False
        return True

    @abstractmethod
    def _check_part(self, part: Mapping[str, Any]) -> None:
        """Raises ValueError where the files of a part are not as they were written."""

    def _put(self, number: int, part: dict[str, Any]) -> None:
        """Notes a part whose files are written, in the place of the one that was there, if any."""
        self.parts[number : number + 1] = [part]
        write_manifest(self.folder, self.manifest)
