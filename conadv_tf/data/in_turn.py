"""The work of threads on items that come one after another, with its results in their order."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def results(
    work: Callable[[Item], Result], items: Iterable[Item], pool: concurrent.futures.Executor, ahead: int
) -> Iterator[Result]:
    """Does the work on every item; `Executor.map` would take all items at once and hold all results.

    Args:
      work: is called in the threads of the pool.
      items: are taken as results are.
      pool: the pool.
      ahead: the number of items, at least 1, that are taken and whose results are not.

    Raises:
      Exception: what the work raises on an item, in its turn. What has not begun then is not begun.
    """
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
