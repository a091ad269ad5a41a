"""Weights from safetensors files to a device through staging memory: several threads read, the device fetches.

A file in the page cache is read at the speed of one core's memcpy, a fraction of what the bus to a GPU takes, so that
several cores read at once, each into pinned memory of its own, from where the device copies while the next piece is
read. Staging takes NUM_READERS * 2 * PIECE_BYTES = 128 MiB of the host's memory, and as much of the device's where
dtypes are converted, however large the checkpoint is; beside it there are the tensors themselves, once. torch keeps the
pinned memory for later transfers.
"""

from __future__ import annotations

import ctypes
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba_core.checkpoints.errors import InvalidWeights
from mamba_core.checkpoints.files import DTYPES, StoredTensor, damaged

NUM_READERS = 8
# a multiple of the size of every element, so that no element is cut
PIECE_BYTES = 8 * 2**20

_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive elements of one tensor: ``num_bytes`` at ``position`` of a file, to become ``target`` [n]."""

    file: Path
    position: int
    num_bytes: int
    dtype: torch.dtype
    target: Tensor


class _Staging:
    """The memory through which one thread's pieces go: of its two buffers one is filled while the other is fetched."""

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        is_cuda = device.type == "cuda"
        self._buffers = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(2)]
        self._views = [_view(buffer) for buffer in self._buffers]
        self._device_buffers: list[Tensor | None] = [None, None]
        self._stream = torch.cuda.Stream(device) if is_cuda else None  # type: ignore[no-untyped-call]
        self._fetched = [torch.cuda.Event() for _ in range(2)] if is_cuda else None  # type: ignore[no-untyped-call]
        self._device = device
        self._turn = 0

    def next_view(self, num_bytes: int) -> memoryview:
        """Memory to read into, once what it held before has been fetched."""
        self._turn ^= 1
        if self._fetched is not None:
            self._fetched[self._turn].synchronize()
        return self._views[self._turn][:num_bytes]

    def send(self, piece: _Piece) -> None:
        """Start the copy of what was read into the last view."""
        staged = self._buffers[self._turn][: piece.num_bytes]
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            if piece.dtype == piece.target.dtype:
                piece.target.view(torch.uint8).copy_(staged, non_blocking=True)
            else:
                piece.target.copy_(self._fetch(staged).view(piece.dtype))
            if self._fetched is not None:
                self._fetched[self._turn].record(self._stream)

    def finish(self) -> None:
        """Wait until everything has arrived."""
        if self._stream is not None:
            self._stream.synchronize()

    def _fetch(self, staged: Tensor) -> Tensor:
        """The bytes on the device, where their conversion is cheap."""
        if self._stream is None:
            return staged
        buffer = self._device_buffers[self._turn]
        if buffer is None:
            num_bytes = self._buffers[self._turn].numel()
            buffer = self._device_buffers[self._turn] = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        return buffer[: staged.numel()].copy_(staged, non_blocking=True)


class _Work:
    """The pieces that are left, for several threads."""

    def __init__(self, pieces: Iterable[_Piece], on_bytes: Callable[[int], object]) -> None:
        self._pieces = iter(pieces)
        self._on_bytes = on_bytes
        self._lock = threading.Lock()

    def next(self) -> _Piece | None:
        with self._lock:
            return next(self._pieces, None)

    def note(self, piece: _Piece) -> None:
        with self._lock:
            self._on_bytes(piece.num_bytes)

    def cancel(self) -> None:
        with self._lock:
            self._pieces = iter(())


def read_staged(
    tensors: Iterable[StoredTensor],
    dtype_of: Callable[[StoredTensor], torch.dtype],
    device: torch.device,
    on_bytes: Callable[[int], object],
    *,
    piece_bytes: int = PIECE_BYTES,
    num_readers: int = NUM_READERS,
) -> dict[str, Tensor]:
    """All tensors on the device, each in the dtype that ``dtype_of`` names, under their stored names.

    ``on_bytes`` is told of every piece, one call at a time, from any thread. Raises InvalidWeights when a file is
    damaged or is not what ``tensors`` says of it.
    """
    wanted = list(tensors)
    positions = {file: _positions(file, wanted) for file in {tensor.file for tensor in wanted}}
    if device.type == "cuda" and device.index is None:
        # which device is the current one is every thread's own affair
        device = torch.device("cuda", torch.cuda.current_device())
    results = {tensor.name: torch.empty(tensor.shape, dtype=dtype_of(tensor), device=device) for tensor in wanted}
    if device.type == "cuda":
        # what that memory was used for before may still be under way, on another stream than those of the readers
        torch.cuda.synchronize(device)
    work = _Work(_pieces(wanted, positions, results, piece_bytes), on_bytes)
    with ExitStack() as stack, ThreadPoolExecutor(num_readers, "weights") as pool:
        files = {file: _open(file, stack) for file in positions}
        readers = [pool.submit(_read_pieces, work, files, device, piece_bytes) for _ in range(num_readers)]
        try:
            for reader in readers:
                reader.result()
        finally:
            work.cancel()
    return results


def _view(buffer: Tensor) -> memoryview:
    """The bytes of a tensor in the host's memory, which must outlive the view."""
    return memoryview((ctypes.c_char * buffer.numel()).from_address(buffer.data_ptr())).cast("B")


def _read_pieces(work: _Work, files: dict[Path, int], device: torch.device, piece_bytes: int) -> None:
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            staging = None
            while (piece := work.next()) is not None:
                staging = staging or _Staging(device, piece_bytes)
                _read(files[piece.file], piece, staging.next_view(piece.num_bytes))
                staging.send(piece)
                work.note(piece)
            if staging is not None:
                staging.finish()
    except BaseException:
        work.cancel()
        raise


def _read(descriptor: int, piece: _Piece, view: memoryview) -> None:
    done = 0
    while done < piece.num_bytes:
        try:
            count = os.preadv(descriptor, [view[done:]], piece.position + done)
        except OSError as error:
            raise damaged(piece.file, error) from error
        if count == 0:
            raise damaged(piece.file, EOFError())
        done += count


def _pieces(
    wanted: list[StoredTensor], positions: dict[Path, dict[str, int]], results: dict[str, Tensor], piece_bytes: int
) -> Iterator[_Piece]:
    for tensor in wanted:
        flat, size = results[tensor.name].view(-1), tensor.dtype.itemsize
        for begin in range(0, flat.numel(), piece_bytes // size):
            target = flat[begin : begin + piece_bytes // size]
            position = positions[tensor.file][tensor.name] + begin * size
            yield _Piece(tensor.file, position, target.numel() * size, tensor.dtype, target)


def _positions(file: Path, wanted: list[StoredTensor]) -> dict[str, int]:
    """Where the wanted tensors of a safetensors file begin. Raises InvalidWeights when they are not those expected."""
    try:
        num_header_bytes, header = _read_header(file)
        begins = {}
        for tensor in wanted:
            if tensor.file != file:
                continue
            entry = header[tensor.name]
            begin, end = entry["data_offsets"]
            if (tuple(entry["shape"]), DTYPES[entry["dtype"]], end - begin) != (
                tensor.shape,
                tensor.dtype,
                tensor.num_bytes,
            ):
                raise InvalidWeights(f"{file.name} changed while it was being read")
            begins[tensor.name] = _LENGTH_BYTES + num_header_bytes + begin
    except KeyError as error:
        raise InvalidWeights(f"{file.name} changed while it was being read") from error
    except (OSError, ValueError, TypeError) as error:
        raise damaged(file, error) from error
    return begins


def _read_header(file: Path) -> tuple[int, Any]:
    with file.open("rb") as stream:
        num_bytes = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        return num_bytes, json.loads(stream.read(min(num_bytes, os.fstat(stream.fileno()).st_size)))


def _open(file: Path, stack: ExitStack) -> int:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise damaged(file, error) from error
    stack.callback(os.close, descriptor)
    return descriptor
