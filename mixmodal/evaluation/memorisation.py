"""Training pictures that samples repeat: the nearest code sequence of training to that of each sample.

Sequences are compared code by code at the same place (Hamming distance), as pixels are in the search for regurgitated
pictures (arXiv 2301.13188, section 4): a copy that is moved by a code or mirrored is not found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixmodal.data.token_shards import TokenShards

TRAINING_AT_A_TIME = 8192
SAMPLES_AT_A_TIME = 256
LARGEST_CODE = 2**24
"""Below it each code is a float32 of its own, which the distances are computed in."""


class CodeBlock(NamedTuple):
    """Some training pictures: their names, and codes int64 `(pictures, codes)`."""

    keys: list[str]
    codes: np.ndarray


class Repeats(NamedTuple):
    """What samples repeat of a training set.

    Args:
        exact: share of the samples whose codes are all those of a training picture.
        near: share of the samples that have at least `threshold` of their codes in common with one; the exact ones too.
        threshold: share of equal codes.
        equal: float64 `(samples,)`, the largest share of equal codes with a training picture.
        nearest: int64 `(samples,)`, the number of that picture in the order of training; of equally near ones
            the first.
        keys: its name, for each sample.
        codes: its codes, int64 `(samples, codes)`.
        num_training: pictures that were compared with.
    """

    exact: float
    near: float
    threshold: float
    equal: np.ndarray
    nearest: np.ndarray
    keys: list[str]
    codes: np.ndarray
    num_training: int


def find_repeats(
    samples: np.ndarray | Tensor,
    training: Iterable[CodeBlock],
    threshold: float = 0.9,
    device: str | torch.device = "cpu",
) -> Repeats:
    """The nearest training picture of each sample, and how many samples repeat one exactly or nearly.

    Shares say little alone: beside them stand those of held-out pictures, whose codes are given as `samples`.

    Args:
        samples: integer codes `(samples, codes)`, or of any further shape, which is flattened.
        training: blocks of training pictures, read one at a time; see `training_codes` and `in_blocks`.
        threshold: share of equal codes from which on a sample is a near repeat, above 0 and at most 1.
        device: where distances are computed.

    Raises:
        ValueError: for no sample or no training picture, other numbers of codes, codes that are none, or a threshold
            out of range.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"repeats: threshold is {threshold}; a share of equal codes above 0 and at most 1 is needed")
    own = _checked(torch.as_tensor(samples), "samples", device)
    length = own.shape[1]
    distance = torch.full((len(own),), torch.inf, device=device)
    nearest = torch.zeros(len(own), dtype=torch.int64, device=device)
    keys = [""] * len(own)
    codes = np.zeros((len(own), length), dtype=np.int64)
    num_training = 0
    for block in training:
        if not len(block.codes):
            continue
        others = _checked(torch.as_tensor(block.codes), "training", device)
        if others.shape[1] != length:
            raise ValueError(f"repeats: samples have {length} codes, training pictures {others.shape[1]}")
        for start in range(0, len(own), SAMPLES_AT_A_TIME):
            rows = slice(start, start + SAMPLES_AT_A_TIME)
            found, index = torch.cdist(own[rows], others, p=0).min(dim=1)
            for place in (found < distance[rows]).nonzero()[:, 0].tolist():
                distance[start + place] = found[place]
                nearest[start + place] = num_training + index[place]
                keys[start + place] = block.keys[int(index[place])]
                codes[start + place] = block.codes[int(index[place])].reshape(length)
        num_training += len(others)
    if not num_training:
        raise ValueError("repeats: there is no training picture to compare with")
    differing = distance.cpu().numpy().astype(np.float64)
    equal = (length - differing) / length
    return Repeats(
        exact=float((differing == 0).mean()),
        near=float((equal >= threshold).mean()),
        threshold=threshold,
        equal=equal,
        nearest=nearest.cpu().numpy(),
        keys=keys,
        codes=codes,
        num_training=num_training,
    )


def in_blocks(codes: np.ndarray, keys: list[str] | None = None, size: int = TRAINING_AT_A_TIME) -> Iterator[CodeBlock]:
    """Codes that lie in memory as blocks.

    Args:
        codes: `(pictures, codes)`.
        keys: names of the pictures; None names them by their numbers.
        size: pictures in a block.
    """
    names = list(map(str, range(len(codes)))) if keys is None else keys
    assert len(names) == len(codes), "not one key for each picture"
    for start in range(0, len(codes), size):
        yield CodeBlock(names[start : start + size], codes[start : start + size])


def training_codes(shards: TokenShards, length: int, size: int = TRAINING_AT_A_TIME) -> Iterator[CodeBlock]:
    """Codes of the pictures in all documents of token shards, a block at a time; keys are those of the documents.

    Args:
        shards: of the training split.
        length: codes of a picture; pictures of another number of codes, as some formats have them, are left out.
        size: pictures in a block.

    Raises:
        ValueError: where the shards hold documents, but no picture of this many codes.
    """
    spelling = shards.build_format()
    keys: list[str] = []
    rows: list[np.ndarray] = []
    found = 0
    for number in range(len(shards)):
        for run in spelling.split(shards[number]):
            if run.modality == "image" and len(run.ids) == length:
                keys.append(shards.keys[number])
                rows.append(shards.vocabulary.from_ids("image", run.ids))
        if len(rows) >= size:
            found += len(rows)
            yield CodeBlock(keys, np.stack(rows))
            keys, rows = [], []
    if rows:
        found += len(rows)
        yield CodeBlock(keys, np.stack(rows))
    if not found and len(shards):
        raise ValueError(f"{shards.manifest_path}: none of its {len(shards)} documents has a picture of {length} codes")


def _checked(codes: Tensor, name: str, device: str | torch.device) -> Tensor:
    """Codes as float32 `(pictures, codes)`, in which they are exact."""
    if codes.ndim < 2 or not codes.numel() or codes.is_floating_point():
        shape = tuple(codes.shape)
        raise ValueError(f"repeats: {name} must be integer codes (pictures, codes), not {shape} of {codes.dtype}")
    if int(codes.min()) < 0 or int(codes.max()) >= LARGEST_CODE:
        raise ValueError(f"repeats: codes of {name} must lie in 0 .. {LARGEST_CODE - 1}")
    return codes.flatten(1).to(device=device, dtype=torch.float32)
