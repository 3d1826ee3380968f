"""Seals: a digest over all bytes of a file, written into its own head, so that one flipped bit shows.

A seal is two digests in hexadecimal digits: of the head that it stands in, with zeros in place of that first half, and
of the data behind the head (or in a second file). It says that a file is as it was written, not who wrote it.
"""

import hashlib
from typing import BinaryIO

from kvfold.errors import FileError

_BYTES = 32  # of a digest
_DIGITS = 2 * _BYTES
BLANK = "0" * (2 * _DIGITS)  # stands in a head until it is sealed

_READ_BYTES = 1 << 20  # at a time


def digest_of(file: BinaryIO) -> str:
    """Digest a file from where it is read next to its end."""
    digest = hashlib.blake2b(digest_size=_BYTES)
    while piece := file.read(_READ_BYTES):
        digest.update(piece)
    return digest.hexdigest()


def sealed(head: bytes, data_digest: str) -> bytes:
    """Fill in the blank seal of a head. The first one counts: a text further behind may look like one."""
    start = head.index(BLANK.encode())
    half, stop = start + _DIGITS, start + 2 * _DIGITS
    head = head[:half] + data_digest.encode() + head[stop:]
    digest = hashlib.blake2b(head, digest_size=_BYTES).hexdigest()
    return head[:start] + digest.encode() + head[half:]


def is_whole(head: bytes, seal: object) -> bool:
    """Tell whether a head is as it was when it got this seal."""
    if not isinstance(seal, str) or len(seal) != 2 * _DIGITS or not seal.isascii():
        return False
    start = head.find(seal.encode())
    zeros = BLANK[:_DIGITS].encode()
    if start < 0:
        return False
    blank = head[:start] + zeros + head[start + _DIGITS :]
    return hashlib.blake2b(blank, digest_size=_BYTES).hexdigest() == seal[:_DIGITS]


def refuse_other_data(file: BinaryIO, seal: str, name: object) -> None:
    """Raise FileError where the data, from here to the end of a file, are not those that were sealed."""
    if digest_of(file) != seal[_DIGITS:]:
        raise FileError(f"{name} was to be read; its tensors are not as they were written; get a sound copy")
