"""Images from outside, decoded in processes of their own: one that takes too much ends its process, not the server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import deque
from subprocess import Popen

import numpy as np
from jaxtyping import UInt8

from bridgetower.processor import images


class Decoders:
    """Processes, as many as threads ask at once, each with so many bytes of memory; one that ends is replaced."""

    def __init__(self, *, max_pixels: int, memory: int) -> None:
        self.memory = memory
        self._command = [sys.executable, "-P", images.__file__, str(max_pixels), str(memory)]
        self._idle: deque[Popen[bytes]] = deque()
        self.processes: set[Popen[bytes]] = set()
        self._closed = False

    def open(
        self,
        content: bytes,
        side: int | None = None,
        *,
        background: images.Colour | None = None,
        fit: images.Fit | None = None,
    ) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[int, int]]:
        """Decodes as `open_reduced`; a ValueError also says that an image takes too much memory or time."""
        try:
            process = self._idle.popleft()
        except IndexError:
            process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        job = json.dumps({"length": len(content), "side": side, "background": background, "fit": fit})
        try:
            process.stdin.write(job.encode() + b"\n")
            process.stdin.write(content)
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            pixels = np.empty(answer.get("shape", 0), np.uint8)
            if process.stdout.readinto(pixels.data.cast("B")) < pixels.size:  # type: ignore[attr-defined]
                raise EOFError
        except (OSError, EOFError, ValueError) as error:
            self.processes.discard(process)
            status = process.wait()
            if not self._closed:
                self._idle.append(self._started())
            most = f"{self.memory // 10**6} MB"
            if status == -signal.SIGPROF:
                most = f"{images.SECONDS:g} s + {images.SECONDS_PER_MEGAPIXEL:g} s per million pixels"
            raise ValueError(f"the image takes more than {most} to decode; save it in another way") from error
        self._idle.append(process)
        if "error" in answer:
            raise ValueError(answer["error"])
        return pixels, tuple(answer["size"])

    def close(self) -> None:
        """Ends all processes, also those at work."""
        self._closed = True
        for process in list(self.processes):
            process.kill()
            process.wait()

    def _started(self) -> Popen[bytes]:
        try:
            process = Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        except OSError as error:  # of which the image is not to blame
            raise RuntimeError(f"no process can be started to decode images: {error}") from error
        self.processes.add(process)
        return process
