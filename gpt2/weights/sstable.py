"""LevelDB's format of sorted keys, which TensorFlow's checkpoints use as their index. It is read whole and checked.

    block ...    entries, offsets of restarts (uint32 each) and their number, then kind of compression and checksum
    index        a block: for each block a key not below its last, and the block's position
    footer       48 bytes: positions of the meta index and the index, zeros, a magic number

An entry shares a prefix of its key with the entry before it. It holds three varints (lengths of the shared prefix, of
the rest of the key, and of the value), then the rest of the key and the value.
Source: google/leveldb, doc/table_format.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

FOOTER_BYTES, MAGIC = 48, 0xDB4775248B80FB57
TRAILER_BYTES = 5  # kind of compression, checksum


def read_table(path: Path) -> dict[bytes, bytes]:
    """Reads all keys and values. Raises ValueError naming the file if it is cut short, damaged or compressed."""
    content = path.read_bytes()
    if len(content) < FOOTER_BYTES or int.from_bytes(content[-8:], "little") != MAGIC:
        raise ValueError(f"{path} is cut short, or no index of a TensorFlow checkpoint: it does not end as one")
    footer = content[-FOOTER_BYTES:-8]
    try:
        _, at = _pair(footer, 0)
        index, _ = _pair(footer, at)
        table: dict[bytes, bytes] = {}
        for _, handle in _entries(_block(content, *index)):
            place, _ = _pair(handle, 0)
            table.update(_entries(_block(content, *place)))
        return table
    except (IndexError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def varint(data: bytes, at: int) -> tuple[int, int]:
    """(the number that begins at byte `at`, its end). Raises IndexError if the data ends before the number does."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("it has a number of more than 64 bits")


def _pair(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """((offset, size), where they end)."""
    offset, at = varint(data, at)
    size, at = varint(data, at)
    return (offset, size), at


def _block(content: bytes, offset: int, size: int) -> bytes:
    """The entries of a block, without its restarts."""
    end = offset + size
    if end + TRAILER_BYTES > len(content) or size < 4:
        raise ValueError(f"it has no block of {size} bytes at {offset}")
    if content[end] != 0:
        raise ValueError(f"its block at {offset} is compressed, which TensorFlow's are not")
    if int.from_bytes(content[end + 1 : end + TRAILER_BYTES], "little") != masked_crc32c(content[offset : end + 1]):
        raise ValueError(f"the checksum of its block at {offset} differs")
    restarts = int.from_bytes(content[end - 4 : end], "little")
    return content[offset : max(offset, end - 4 - 4 * restarts)]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    at, key = 0, b""
    while at < len(block):
        shared, at = varint(block, at)
        more, at = varint(block, at)
        length, at = varint(block, at)
        key = key[:shared] + block[at : at + more]
        at += more
        yield key, block[at : at + length]
        at += length


def masked_crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) in LevelDB's masked form: rotated, plus a constant."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _CRC[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _remainder(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_CRC = [_remainder(byte) for byte in range(256)]
