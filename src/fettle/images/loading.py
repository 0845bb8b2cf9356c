"""Decode and frame pictures in threads, ahead of the network that takes them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Generic, TypeVar

from fettle.errors import PictureError
from fettle.images.decode import read_picture
from fettle.images.framing import Frame, Placed
from fettle.images.picture import Picture
from fettle.inspection import Refusal
from fettle.memory import give_back

Item = TypeVar("Item")

_WORKERS = 2
_AHEAD = 8  # pictures decoded but not yet taken
_TRIM_EVERY = 64  # pictures


@dataclass(frozen=True)
class Loaded(Generic[Item]):
    """One picture, decoded and framed, with the item it was asked for by.

    Attributes:
        seconds: time for decoding and framing, s.
    """

    item: Item
    picture: Picture
    placed: Placed
    seconds: float


def load_framed(
    items: Iterable[Item], path_of: Callable[[Item], Path], frame: Frame
) -> Iterator[Loaded[Item] | tuple[Item, Refusal]]:
    """Pictures in the order of `items`; one that cannot be used comes as a refusal and stops nothing."""

    def load(item: Item) -> Loaded[Item] | tuple[Item, Refusal]:
        start = time.perf_counter()
        path = path_of(item)
        try:
            picture = read_picture(path)
            placed = frame.place(picture)
        except PictureError as error:
            return item, Refusal(str(path), str(error))
        return Loaded(item, picture, placed, time.perf_counter() - start)

    queue: deque[Future[Loaded[Item] | tuple[Item, Refusal]]] = deque()
    source = iter(items)
    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="decode") as pool:
        try:
            queue.extend(pool.submit(load, item) for item in islice(source, _AHEAD))
            for number in count():
                if not queue:
                    return
                if number % _TRIM_EVERY == 0:
                    give_back()
                done = queue.popleft().result()
                queue.extend(pool.submit(load, item) for item in islice(source, 1))
                yield done
        finally:
            for waiting in queue:
                waiting.cancel()
