"""Runs the architectures in several processes; each result is a line in a file."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LARGE = 2 << 30  # Memory after which a process is replaced.
PATIENCE = 10  # How many times its processor time an architecture may take by the clock.


def sweep(
    architectures: Sequence[str], results: Path, jobs: int, seconds: float, progress: Any
) -> None:
    """Examine every architecture that `results` does not have yet.

    Args:
        architectures: model types.
        results: a file of JSON lines, added to as each architecture is done.
        jobs: processes at once.
        seconds: processor time for one architecture, after which no further pair is begun.
        progress: called with each result.
    """
    if results.exists() and not results.read_bytes().endswith(b"\n"):
        with results.open("a") as file:  # An earlier sweep was ended while it wrote.
            file.write("\n")
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in architectures:
        waiting.put(name)
    lock = threading.Lock()

    def work() -> None:
        worker = None
        while True:
            try:
                name = waiting.get_nowait()
            except queue.Empty:
                break
            worker = worker or Worker()
            result = worker.ask(name, seconds)
            if result.get("memory", LARGE) >= LARGE:
                worker = worker.end()
            with lock:
                with results.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                progress(result)
        if worker is not None:
            worker.end()

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def read(results: Path) -> list[dict[str, Any]]:
    """The results so far, the last one of each architecture."""
    found: dict[str, dict[str, Any]] = {}
    for line in results.read_text().splitlines() if results.exists() else []:
        with suppress(json.JSONDecodeError):  # One that was being written at the end of a sweep.
            row = json.loads(line)
            found[row["architecture"]] = row
    return list(found.values())


def checked_in(rows: Sequence[dict[str, Any]]) -> set[str]:
    """The architectures that were checked."""
    return {row["architecture"] for row in rows if row["status"] == "checked"}


class Worker:
    """A process that examines architectures, one after the other."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HERE), "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, architecture: str, seconds: float) -> dict[str, Any]:
        """The result; that it took too long, or that the process died, is one too."""
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(PATIENCE * seconds, end)
        timer.start()
        try:
            process.stdin.write(json.dumps([architecture, seconds]) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        status = "out of time" if late.is_set() else "crashed"
        code = process.wait()
        error = f"ended after {PATIENCE * seconds:.0f} s" if late.is_set() else f"exit code {code}"
        return {"architecture": architecture, "status": status, "error": error}

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
