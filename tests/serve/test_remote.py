"""URLs: only hosts that are allowed, only public addresses, no redirects, limits on what comes."""

import asyncio
import ipaddress
import shutil
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import anyio
import httpcore
import pytest

from bridgetower.serve import remote as remote_module
from bridgetower.serve.remote import AT_ONCE, RemoteImages, is_public
from helpers.servers import PNGS, URIS, error_of, start_server, wait_until, write_certificate

FILE = "/a.png?size=1"


class Images(BaseHTTPRequestHandler):
    def do_GET(self):
        match self.path:
            case "/a.png?size=1":
                self._send(PNGS[0])
            case "/moved":
                self.send_response(302)
                self.send_header("Location", FILE)
                self.end_headers()
            case "/endless":
                self._send(b"x" * 300_000)
            case "/slow":
                self._send(b"")
                self._drip()
            case "/headers":
                self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Endless: ")
                self._drip()
            case "/garbage":
                self.wfile.write(b"garbage\r\n\r\n")
            case _:
                self.send_error(404)

    def _send(self, content):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)

    def _drip(self):
        for _ in range(20):
            self.wfile.write(b"x")
            time.sleep(0.1)

    def log_message(self, *_):
        """Keeps the tests quiet."""


def fetched(remote, url):
    return asyncio.run(remote.fetch(url))


@pytest.fixture(scope="module")
def address():
    with ThreadingHTTPServer(("127.0.0.1", 0), Images) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def public_addresses(monkeypatch):
    monkeypatch.setattr(remote_module, "is_public", lambda address: address.is_loopback)


@pytest.fixture
def remote(address, public_addresses):
    return RemoteImages(
        [address, address.replace("127.0.0.1", "localhost")], max_bytes=200_000, timeout=0.5
    )


@pytest.fixture
def looked_up(monkeypatch):
    look_up = socket.getaddrinfo

    def led(host, addresses, timeout=5.0):
        def found(name, *arguments, **options):
            if name != host.partition(":")[0]:
                return look_up(name, *arguments, **options)
            return [
                (socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, 0)) for address in addresses()
            ]

        monkeypatch.setattr(socket, "getaddrinfo", found)
        return RemoteImages([host], max_bytes=200_000, timeout=timeout)

    return led


def test_an_image(remote, address):
    for url in (
        f"http://{address}{FILE}",
        f"HTTP://{address.replace('127.0.0.1', 'LOCALHOST')}{FILE}#part",
    ):
        assert fetched(remote, url) == PNGS[0]


@pytest.mark.usefixtures("public_addresses")
@pytest.mark.parametrize("addresses", [["127.0.0.1", "127.0.0.2"], ["127.0.0.2", "127.0.0.1"]])
def test_all_addresses_of_a_host_are_tried(address, addresses, looked_up):
    host = address.replace("127.0.0.1", "images.test")
    assert fetched(looked_up(host, lambda: addresses), f"http://{host}{FILE}") == PNGS[0]


PRIVATE = [
    ["8.8.8.8", "127.0.0.1"],
    ["127.0.0.1", "8.8.8.8"],
    ["::1"],
    ["2606:4700::1111", "fe80::1%lo"],
]


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("addresses", [*PRIVATE, ["8.8.8.8"] * 9 + ["10.0.0.1"]])
def test_a_host_with_an_address_that_is_not_public_is_not_connected_to(
    addresses, scheme, looked_up, monkeypatch
):
    async def connect(*arguments, **options):
        pytest.fail(f"connects to {arguments}")

    monkeypatch.setattr(anyio, "connect_tcp", connect)
    with pytest.raises(ValueError, match="is at an address that is not public"):
        fetched(looked_up("example.org", lambda: addresses), f"{scheme}://example.org/a.png")


@pytest.mark.usefixtures("public_addresses")
def test_what_is_connected_to_is_what_was_checked(address, looked_up):
    """A name that resolves to another address by the time of the connection is of no use."""
    answers = [["127.0.0.9"], ["127.0.0.1"]]
    host = address.replace("127.0.0.1", "images.test")
    assert fetched(looked_up(host, answers.pop), f"http://{host}{FILE}") == PNGS[0]
    assert answers == [["127.0.0.9"]]


def test_an_address_that_does_not_answer_has_a_share_of_the_time(looked_up, monkeypatch):
    timeouts = []

    async def connect(self, address, port, seconds, *_):
        timeouts.append(seconds)
        raise httpcore.ConnectTimeout

    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", connect)
    with pytest.raises(ValueError, match="did not arrive within 5 s"):
        fetched(
            looked_up("example.org", lambda: ["8.8.8.8", "9.9.9.9", "1.1.1.1"]),
            "http://example.org/a.png",
        )
    assert timeouts == pytest.approx([5 / 3, 5 / 2, 5], rel=0.05)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/moved", "status 302; redirects are not followed"),
        *((path, "status 404$") for path in ("/other", "/", "", "?a")),
        ("/endless", "larger than 200000 bytes"),
        *((path, r"did not arrive within 0\.5 s") for path in ("/slow", "/headers")),
        ("/garbage", "does not answer in HTTP"),
    ],
)
def test_what_a_host_may_do_instead(remote, address, path, words):
    with pytest.raises(ValueError, match=words):
        fetched(remote, f"http://{address}{path}")


ODD = [
    "http://example.org/a.png",
    "http://127.0.0.1/a.png",
    "http://127.0.0.1:1/a.png",
    "http://user@{place}/a.png",
]
ODD += [
    "http://{place}@example.org/a.png",
    "http://{place}.example.org/a.png",
    "https:///a.png",
    "http://[::1/a.png",
]
ODD += ["http://{place}/a b", "http://{place}/\r\nHost: other", "http://{place}/ä.png"]


@pytest.mark.parametrize("url", ODD)
def test_other_hosts_and_odd_urls(remote, address, url):
    with pytest.raises(ValueError, match=r"not fetched from|must be escaped|Port|Invalid|netloc"):
        fetched(remote, url.format(place=address))


def test_names_that_lead_to_this_machine_and_nowhere(address):
    for host, words in (
        (address, "at an address that is not public"),
        ("nowhere.invalid", "is not known"),
    ):
        with pytest.raises(ValueError, match=words):
            fetched(RemoteImages([host], max_bytes=9, timeout=5.0), f"http://{host}/a.png")


class Hanging:
    def __init__(self):
        self.go = threading.Event()
        self.most = self.now = 0
        self._lock = threading.Lock()

    def __call__(self):
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        self.go.wait()
        with self._lock:
            self.now -= 1
        raise OSError("let go")


def test_a_look_up_that_hangs_is_left_alone(looked_up):
    hanging = Hanging()
    remote = looked_up("example.org", hanging, timeout=0.1)
    for _ in range(AT_ONCE + 2):
        with pytest.raises(ValueError, match=r"did not arrive within 0\.1 s"):
            fetched(remote, "http://example.org/a.png")
    wait_until(lambda: hanging.now == AT_ONCE)
    assert hanging.most == AT_ONCE
    hanging.go.set()
    with pytest.raises(ValueError, match=r"'example\.org' is not known \(let go\)"):
        fetched(looked_up("example.org", hanging, timeout=60.0), "http://example.org/a.png")


def test_a_server_that_allows_hosts(predictor, address, looked_up):
    """Forbidden hosts are refused. Slow hosts take no places of requests that fetch nothing."""
    hanging = Hanging()
    looked_up("slow.example", hanging)
    far = "http://slow.example/a.png"
    param = {"modality": "image"}
    requests = [
        ("/v1/embeddings", {"input": [far] * 2, **param}),
        ("/v1/match", {"images": far, "texts": "a"}),
        ("/v1/rerank", {"query": {"image": far}, "documents": ["a"]}),
        ("/v1/explain", {"image": far, "text": "a"}),
    ]
    limits = {"queue": 7, "max_items": 5, "allow_host": ("slow.example", address), "timeout": 600.0}
    with start_server(predictor, **limits) as server, ThreadPoolExecutor(len(requests)) as pool:
        for url, words in (
            (f"http://{address}{FILE}", "not public"),
            ("http://example.org/a.png", "not fetched from 'example.org'"),
            ("file:///etc/passwd", "expected a data URI"),
            (f"http://{'a' * 10**6}.org/a.png", "a.org'; send a data URI"),
        ):
            for body in (
                {"input": url, "modality": "image"},
                {"input": ["a", {"text": "a", "image": url}]},
            ):
                error = error_of(server.client.post("/v1/embeddings", json=body), 400)
                assert words in error["message"]
                assert len(error["message"]) <= 4003
                assert error["code"] == "invalid_image"
        slow = [pool.submit(server.client.post, path, json=body) for path, body in requests]
        wait_until(
            lambda: server.service.scheduler.admitted == 3 + 2 * server.service.costs["image"]
        )
        response = server.client.post("/v1/match", json={"images": far, "texts": "b"})
        error = error_of(response, 429)
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert int(response.headers["retry-after"]) >= 1
        for body in ({"input": ["http://example.org"] * 5}, {"input": URIS, **param}):
            assert server.client.post("/v1/embeddings", json=body).status_code == 200
        hanging.go.set()
        assert [request.result().status_code for request in slow] == [400] * len(slow)


@pytest.fixture
def encrypted(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes certificates, is not installed")
    certificate = write_certificate(tmp_path, "localhost")
    with ThreadingHTTPServer(("127.0.0.1", 0), Images) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, certificate.with_suffix(".key"))
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield str(server.server_port), certificate
        server.shutdown()


@pytest.mark.usefixtures("public_addresses")
def test_certificates(encrypted, monkeypatch):
    port, certificate = encrypted
    local, number = (f"https://{host}:{port}{FILE}" for host in ("localhost", "127.0.0.1"))

    def remote():
        return RemoteImages(
            [f"localhost:{port}", f"127.0.0.1:{port}"], max_bytes=200_000, timeout=5.0
        )

    with pytest.raises(ValueError, match="self-signed"):
        fetched(remote(), local)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    trusting = remote()
    assert fetched(trusting, local) == PNGS[0]
    with pytest.raises(ValueError, match="IP address mismatch"):
        fetched(trusting, number)
    monkeypatch.delenv("SSL_CERT_FILE")
    assert fetched(trusting, local) == PNGS[0]  # certificates are read once, not again


def test_addresses_that_are_not_public_and_those_that_are():
    for address in (
        *(
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "0.0.0.0",
            "100.64.0.1",
        ),
        *(
            "224.0.0.1",
            "255.255.255.255",
            "::1",
            "::",
            "fe80::1",
            "fc00::1",
            "ff02::1",
            "::ffff:127.0.0.1",
        ),
        *(
            "64:ff9b::7f00:1",
            "64:ff9b:1::7f00:1",
            "2002:7f00:1::",
            "2001:0:7f00:1::",
            "2002::",
            "::7f00:1",
        ),
        *(
            "::ffff:8.8.8.8",
            "::ffff:0:8.8.8.8",
            "fec0::1",
            "fd00::1",
            "100::1",
            "2001:db8::1",
            "3fff::1",
            "2001:20::1",
        ),
        *(
            "5f00::1",
            "4000::1",
            "192.0.0.8",
            "192.0.0.171",
            "192.0.2.1",
            "198.18.0.1",
            "198.51.100.1",
            "203.0.113.1",
        ),
        *("192.88.99.1", "0.1.2.3", "240.0.0.1", "239.1.2.3"),
    ):
        assert not is_public(ipaddress.ip_address(address)), address
    for address in ("8.8.8.8", "192.0.1.1", "100.128.0.1", "198.20.0.1", "2606:4700::1111"):
        assert is_public(ipaddress.ip_address(address)), address
