"""Checkpoints: a tree of tensors and plain values as one safetensors file, written whole or not at all.

No pickle. The tree and a CRC-32 of everything in it, tensors included, stand in the file's metadata.
"""

import json
import os
import secrets
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

__all__ = ["load_checkpoint", "save_checkpoint", "write_atomically"]


FORMAT = "splitlearn checkpoint 1"


def save_checkpoint(path: Path, state: Any) -> None:
    """Write ``state``, dicts, lists and tuples of tensors, numbers, strings, booleans and None, to ``path``.

    The file appears whole or not at all. Raises ``ValueError`` for anything else in the tree, and where the file
    cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_flat(state, tensors))
    metadata = {"tree": tree, "crc32": f"{_checksum(tree, tensors):08x}", "format": FORMAT}
    write_atomically(path, save(tensors, metadata=metadata))


def load_checkpoint(path: Path) -> Any:
    """Return what ``save_checkpoint`` wrote, tensors on the CPU.

    Raises ``LookupError`` where there is no file, ``ValueError`` where it is cut short, changed, or not one of ours.
    """
    if not path.is_file():
        raise LookupError(f"expected a checkpoint at {path}, found none; train with checkpoint=Path(…) first")
    try:
        content = path.read_bytes()  # once: safe_open opens the file twice, and may find another one the second time
        raw = load(content)
        (length,) = struct.unpack_from("<Q", content)
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is cut short or not a checkpoint ({error}); delete it and start again") from error
    if metadata.get("format") != FORMAT or "tree" not in metadata:
        raise ValueError(f"{path} is a safetensors file, but not a checkpoint of this toolkit; give another path")
    found = f"{_checksum(metadata['tree'], raw):08x}"  # before the copy, which would make any true byte a 1
    if found != metadata.get("crc32"):
        raise ValueError(
            f"{path} is damaged: expected checksum {metadata.get('crc32')}, got {found}; delete it and start again"
        )
    tensors = {name: tensor.clone() for name, tensor in raw.items()}  # aligned, as matrix products like it
    try:
        return _full(json.loads(metadata["tree"]), tensors)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} holds no tree of tensors and plain values ({error}); give another path") from error


def write_atomically(path: Path, content: bytes) -> Path:
    """Write ``content`` to ``path`` through a temporary file beside it, and return ``path``.

    The file appears whole or not at all: a reader finds the old one or the new one, even after a crash.

    Raises ``ValueError`` where that is not possible; what stood at ``path`` before then still stands.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise ValueError(
                f"{path} cannot be written ({error.strerror}); free space or choose another folder"
            ) from error
        raise
    return path


def _checksum(tree: str, tensors: dict[str, Tensor]) -> int:
    """Return the CRC-32 of the tree and of each tensor's name, type, shape and bytes."""
    crc = zlib.crc32(tree.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


def _flat(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the tree in JSON's terms, its tensors moved to ``tensors``; each node is tagged with its type."""
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return ["tensor", name]
    if isinstance(value, dict):
        return ["dict", [[_flat(key, tensors), _flat(entry, tensors)] for key, entry in value.items()]]
    if isinstance(value, list | tuple):
        return ["list" if isinstance(value, list) else "tuple", [_flat(entry, tensors) for entry in value]]
    if value is None or isinstance(value, bool | int | float | str):
        return ["value", value]
    raise ValueError(f"a checkpoint holds tensors and plain values, got {type(value).__name__}; convert it first")


def _full(node: Any, tensors: dict[str, Tensor]) -> Any:
    tag, value = node
    if tag == "tensor":
        return tensors[value]
    if tag == "dict":
        return {_full(key, tensors): _full(entry, tensors) for key, entry in value}
    if tag in ("list", "tuple"):
        entries = [_full(entry, tensors) for entry in value]
        return entries if tag == "list" else tuple(entries)
    return value
