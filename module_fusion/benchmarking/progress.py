"""A progress bar on what takes longer than a second."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import MissingPackageError, needed

DELAY_S = 1.0
_BETWEEN_S = 0.1
_FORMAT = "{desc} {percentage:3.0f}% |{bar:20}| {elapsed}"


class Progress:
    """A bar on stderr, made once a second has passed and gone at the end.

    Args:
        wanted: False for none; True needs tqdm; None shows it where tqdm is installed.

    Raises:
        MissingPackageError: it is wanted and tqdm is not installed.
    """

    def __init__(self, wanted: bool | None) -> None:
        self._make: Any = None
        if wanted is not False:
            try:
                tqdm = needed("tqdm", "progress=True", "'module-fusion[bench]'")
                self._make = tqdm.tqdm
            except MissingPackageError:
                if wanted:
                    raise
        self._start = time.perf_counter()
        self._shown = 0.0
        self._bar: Any = None
        self._lock = threading.Lock()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._make = None
            if self._bar is not None:
                self._bar.close()

    def show(self, what: str, fraction: float = 0.0) -> None:
        """Say what is being done, and how much of all is done."""
        now = time.perf_counter()
        if now - self._start < DELAY_S or now - self._shown < _BETWEEN_S:
            return
        with self._lock:
            if self._make is None:
                return
            if self._bar is None:
                self._bar = self._make(
                    total=1.0, file=sys.stderr, leave=False, bar_format=_FORMAT, desc=what
                )
                self._bar.start_t -= now - self._start
            self._bar.n = min(fraction, 1.0)
            self._bar.set_description_str(what)
            self._shown = now

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """One step that may take long; the bar appears although nobody calls `show` in it."""
        self.show(what)
        wait = max(0.0, self._start + DELAY_S - time.perf_counter())
        timer = threading.Timer(wait + 0.01, self.show, (what,))
        timer.daemon = True
        if self._make is not None:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()
