"""Requests of OPEA's protocol (`/v1/encode`) to `bridgetower serve`, beside a server as OPEA runs on a CPU.

The peer is transformers' model in float32 and eager mode, one request after the other, texts padded to 200 tokens. Both
have the same random weights of the base model with contrastive heads. Clients ask again as soon as they are answered;
half of the mixed requests are texts, half images with texts. Prints requests a second of each, and their ratio:

    python research/opea.py [--seconds 20] [--clients 8] [--precision bf16]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import socket
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bridgetower.checkpoints import Checkpoint, convert, write_checkpoint
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.presets import BASE
from bridgetower.processor import Processor, ProcessorConfig, train_tokenizer

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from serving import measure
from serving_client import (
    Connection,
    Server,
    bridgetower_serve,
    image,
    request_bytes,
    running,
    text,
)

PADDED = 200  # tokens


def write_both(folder: Path, *, quick: bool) -> tuple[Path, Path]:
    """Writes a model with random weights, for `bridgetower serve` and for transformers."""
    generator = torch.Generator().manual_seed(0)
    few = {
        "vision.num_layers": 2,
        "text.num_layers": 2,
        "fusion.num_layers": 1,
        "vision.image_size": 64,
    }
    preset = BASE.override(few) if quick else BASE
    side, patch = preset.vision.image_size, preset.vision.patch_size
    config = ProcessorConfig(profile="hf", image_size=side, patch_size=patch, max_length=PADDED)
    processor = Processor(
        config, train_tokenizer([text(generator) for _ in range(200)], vocab_size=400)
    )
    sizes = {
        "text.vocab_size": processor.vocab_size,
        "text.max_positions": PADDED + 2,
        "heads.itc": "fused",
    }
    model = BridgeTower(preset.override(sizes), generator=generator)
    checkpoint = Checkpoint(
        source="random", config=model.config, tensors=model.state_dict(), processor=processor
    )
    write_checkpoint(checkpoint, folder / "ours")
    convert(checkpoint, folder / "theirs", "hf")
    return folder / "ours", folder / "theirs"


def requests(kind: str, side: int, count: int = 16) -> list[bytes]:
    """Returns different requests: texts, pairs, or both in turn."""
    generator = torch.Generator().manual_seed(0)
    texts = [{"text": text(generator, 10)} for _ in range(count)]
    shown = [base64.b64encode(image(generator, side)).decode() for _ in range(count)]
    pairs = [{**one, "img_b64_str": content} for one, content in zip(texts, shown, strict=True)]
    mixed = [one for both in zip(texts, pairs, strict=True) for one in both]
    return [
        request_bytes("/v1/encode", body)
        for body in {"texts": texts, "pairs": pairs, "mixed": mixed}[kind]
    ]


def serve_as_opea(folder: str) -> None:
    """Serves a folder of transformers until it is ended."""
    import uvicorn
    from fastapi import FastAPI
    from transformers import BridgeTowerForContrastiveLearning, BridgeTowerProcessor

    model = BridgeTowerForContrastiveLearning.from_pretrained(folder).eval()
    processor = BridgeTowerProcessor.from_pretrained(folder)
    app, one = FastAPI(), threading.Lock()
    padded = {
        "return_tensors": "pt",
        "max_length": PADDED,
        "padding": "max_length",
        "truncation": True,
    }

    @app.post("/v1/encode")
    @torch.no_grad()
    def encode(body: dict[str, Any]) -> dict[str, Any]:
        with one:
            if "img_b64_str" in body:
                shown = Image.open(io.BytesIO(base64.b64decode(body["img_b64_str"]))).convert("RGB")
                found = model(**processor(shown, body["text"], **padded)).logits[0, 2]
            else:
                tokens = processor.tokenizer([body["text"]], **padded)
                hidden = model.bridgetower.text_model(**tokens).last_hidden_state[:, 0]
                found = torch.nn.functional.normalize(model.itc_text_head(hidden), dim=-1)[0]
        return {"embedding": found.tolist()}

    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    print(
        f"serving it at http://127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr, flush=True
    )
    uvicorn.Server(
        uvicorn.Config(app, log_config=None, access_log=False, timeout_keep_alive=600)
    ).run(sockets=[listener])


async def answers(server: Server, asked: Sequence[bytes]) -> torch.Tensor:
    """Returns the vectors that a server answers with."""
    connection = Connection(server)
    found = [(await connection.send(one)).json()["embedding"] for one in asked]
    connection.close()
    return torch.tensor(found)


def main() -> None:
    """Measures both in turns and prints a row of JSON for each kind of requests."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="for each figure")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        default="fp32",
        help="of ours; the peer has float32",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few layers: does it run, are the vectors equal?"
    )
    parser.add_argument("--as-opea", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.as_opea:
        serve_as_opea(given.as_opea)
        return
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        ours, theirs = write_both(folder, quick=given.quick)
        command = bridgetower_serve(ours, "--no-page", "--precision", given.precision)
        servers = [
            stack.enter_context(running(folder / "theirs.log", __file__, "--as-opea", str(theirs))),
            stack.enter_context(running(folder / "ours.log", *command)),
        ]
        for kind in ("texts", "pairs", "mixed"):
            asked = requests(kind, 320)
            expected, found = (asyncio.run(answers(server, asked[:4])) for server in servers)
            rates = [0.0, 0.0]
            for _, (place, server) in itertools.product(range(2), enumerate(servers)):
                seconds, times = asyncio.run(
                    measure(server, asked, given.clients, given.seconds / 2)
                )
                rates[place] += len(times) / seconds / 2
            row = {
                "kind": kind,
                "clients": given.clients,
                "precision": given.precision,
                "theirs_per_second": rates[0],
            }
            row |= {"ours_per_second": rates[1], "ratio": rates[1] / rates[0]}
            print(
                json.dumps(row | {"largest_difference": float((expected - found).abs().max())}),
                flush=True,
            )


if __name__ == "__main__":
    main()
