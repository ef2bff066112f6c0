"""What the measurements of the server share: a small model, the server as a process, and a lean HTTP client."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bridgetower.checkpoints import Checkpoint, write_checkpoint
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.presets import NANO
from bridgetower.processor import Processor, ProcessorConfig, train_tokenizer

WORDS = re.findall(
    r"\w+",
    "two dogs and a small red flag run over fresh white snow near the old blue house at night",
)
_PLACE = re.compile(r"serving .* at (http://(\S+):(\d+))")


def write_nano(folder: Path) -> Path:
    """Writes the nano model with random weights: as fast as a trained one."""
    generator = torch.Generator().manual_seed(0)
    texts = [text(generator) for _ in range(200)]
    vision = NANO.vision
    config = ProcessorConfig(
        profile="official-pretrain",
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        max_length=64,
    )
    processor = Processor(config, train_tokenizer(texts, vocab_size=400))
    model = BridgeTower(
        NANO.override({"text.vocab_size": processor.vocab_size}), generator=generator
    )
    checkpoint = Checkpoint(
        source="nano", config=model.config, tensors=model.state_dict(), processor=processor
    )
    write_checkpoint(checkpoint, folder)
    return folder


def text(generator: torch.Generator, length: int = 8) -> str:
    """Returns some words."""
    return " ".join(
        WORDS[number] for number in torch.randint(len(WORDS), (length,), generator=generator)
    )


def image(generator: torch.Generator, side: int = 64) -> bytes:
    """Returns the file of an image: coarse noise, as JPEG."""
    pixels = torch.randint(256, (8, 8, 3), generator=generator).to(torch.uint8).numpy()
    stream = io.BytesIO()
    Image.fromarray(np.kron(pixels, np.ones((side // 8, side // 8, 1), np.uint8))).save(
        stream, "JPEG"
    )
    return stream.getvalue()


def data_uri(content: bytes) -> str:
    """Returns an image as requests hold it."""
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
        host, port: Where.
        process: It.
        log: What it has said.
    """

    host: str
    port: int
    process: subprocess.Popen[str]
    log: Path

    def memory(self) -> int:
        """Returns the bytes that it has in memory, without the processes that decode images."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@contextmanager
def running(
    log: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Runs a Python program that serves and says where, and ends it as a service manager does."""
    command = [sys.executable, *arguments]
    environment = {**os.environ, **(environment or {})}
    with (
        log.open("w") as written,
        subprocess.Popen(command, stderr=written, text=True, env=environment) as process,
    ):
        try:
            while not (found := _PLACE.search(log.read_text())):
                if process.poll() is not None:
                    raise RuntimeError(log.read_text())
                time.sleep(0.01)
            yield Server(found[2], int(found[3]), process, log)
        finally:
            process.terminate()
            process.wait(60)


def bridgetower_serve(model: Path, *options: str) -> tuple[str, ...]:
    """Returns the arguments that serve a model on a free port."""
    return ("-m", "bridgetower", "serve", "--model", str(model), "--port", "0", *options)


def request_bytes(path: str, body: Mapping[str, Any]) -> bytes:
    """Returns a POST of JSON, ready to be sent."""
    content = json.dumps(body).encode()
    headers = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return headers.encode() + content


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Returns the content."""
        return json.loads(self.body)


class Connection:
    """A kept connection that costs the client next to nothing."""

    def __init__(self, server: Server, source: str | None = None) -> None:
        """Takes the server, and the address that it sees as the client's; default: the system's choice."""
        self.server = server
        self._local = None if source is None else (source, 0)
        self._reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def open(self) -> asyncio.StreamWriter:
        """Connects, if it is not connected."""
        if self.writer is None or self.writer.is_closing():
            self._reader, self.writer = await asyncio.open_connection(
                self.server.host, self.server.port, local_addr=self._local
            )
        return self.writer

    async def send(self, request: bytes) -> Reply:
        """Sends a request and reads its reply."""
        writer = await self.open()
        writer.write(request)
        await writer.drain()
        return await self.reply()

    async def reply(self, *, with_body: bool = True) -> Reply:
        """Reads a reply; one to HEAD has no body."""
        assert self._reader is not None
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(": ") for line in head[1:] if line)
        headers = {name.lower(): value for name, _, value in pairs}
        body = await self._reader.readexactly(
            int(headers.get("content-length", "0")) if with_body else 0
        )
        if headers.get("connection") == "close":
            self.close()
        return Reply(int(head[0].split()[1]), headers, body)

    def close(self) -> None:
        """Leaves."""
        if self.writer is not None:
            self.writer.close()
        self._reader = self.writer = None
