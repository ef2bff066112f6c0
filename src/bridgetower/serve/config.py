"""Options of the server, importable without torch and without the web libraries."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from bridgetower.plain import AT_LEAST_1, check_numbers

# Of `max_items`, and of the entries in any list of a request: more would take long to parse.
MOST_ITEMS = 4096
MOST_TOP = 100  # answers to a question, words for a mask or hits of a search in one request

_NAME = r"[a-z0-9.-]+"


def _is(pattern: str) -> Callable[[str], object]:
    return re.compile(pattern, re.IGNORECASE).fullmatch


_FORMS: tuple[tuple[str, Callable[[str], object], str], ...] = (
    ("allow_host", _is(f"{_NAME}(:[0-9]+)?"), "a name such as images.example.org, or name:port"),
    ("server_name", _is(_NAME), "a name such as photos.example.org, without a port"),
    ("root_path", _is("(/[a-z0-9._~-]+)*"), "a prefix such as /photos, without a slash at its end"),
    (
        "forwarded_allow_ips",
        ipaddress.ip_network,
        "an address or a network, such as 127.0.0.1 or 10.0.0.0/8",
    ),
    (
        "cors_origin",
        _is(f"(?-i:https?://{_NAME}(:[0-9]+)?)"),
        "a site such as https://app.example.org, without a path",
    ),
)


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How a model is served.

    Attributes:
        host: Address to listen at; one that other machines can reach needs an API key.
        port: Port to listen at; 0 takes a free one.
        api_key: What clients must send as `Authorization: Bearer KEY`; default: nothing.
        name: What clients call the model; default: what was loaded.
        max_batch: Most items (an image, a text or a pair) computed at once; default: 16 on a CPU, where more at
            once take as long in turn, and 64 on a GPU.
        queue: Most work admitted and not yet answered, counted in pairs of an image and a text; a client may have half
            of it, and gets status 429 for more. Requests with URLs have as much room of their own.
        timeout: Seconds until the response to a request begins, its upload included.
        max_body: Largest request body, in MiB.
        max_pixels: Largest image, in millions of pixels.
        max_items: Most items in one request, 4096 or fewer.
        allow_host: Hosts from which images are fetched when a request has a URL, with :port unless it is the usual
            one; by default none.
        page: Serve the page at / and the reference of the API at /docs.
        access_log: Write a line of JSON for each request to standard output.
        replicas: Processes that serve the model, each with its own copy of it and its share of the cores or GPUs.
        server_name: Names besides those of this machine that a server without API key answers to, such as the name of
            a proxy in front of it.
        root_path: Prefix under which a proxy in front of the server offers it, such as /photos.
        forwarded_allow_ips: Addresses and networks of proxies whose X-Forwarded-For, -Proto and -Host are believed; by
            default none.
        cors_origin: Other sites whose pages may use the server, such as https://app.example.org; by default none.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    name: str | None = None
    max_batch: int | None = None
    queue: int = 2048
    timeout: float = 60.0
    max_body: int = 32
    max_pixels: int = 40
    max_items: int = 1024
    allow_host: tuple[str, ...] = ()
    page: bool = True
    access_log: bool = False
    replicas: int = 1
    server_name: tuple[str, ...] = ()
    root_path: str = ""
    forwarded_allow_ips: tuple[str, ...] = ()
    cors_origin: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        counts = ("max_batch", "queue", "max_body", "max_pixels", "replicas")
        check_numbers(
            self,
            "",
            port=(0, 2**16 - 1),
            max_items=(1, MOST_ITEMS),
            **dict.fromkeys(counts, AT_LEAST_1),
        )
        if self.timeout <= 0:
            raise ValueError(f"timeout is {self.timeout}; expected more than 0")
        if self.api_key is not None and not (
            self.api_key and self.api_key.isascii() and self.api_key.isprintable()
        ):
            raise ValueError(
                "the API key is empty or has characters that cannot be sent; expected printable ASCII"
            )
        if self.api_key is not None and self.api_key.strip() != self.api_key:
            raise ValueError(
                "the API key begins or ends with a space, which HTTP does not send; leave the space out"
            )
        for name, form, expected in _FORMS:
            values = getattr(self, name)
            for value in (values,) if isinstance(values, str) else values:
                fits: object = None
                with suppress(ValueError):
                    fits = form(value)
                if not fits:
                    raise ValueError(f"{name} has {value!r}; expected {expected}")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
