"""A real nginx in front of the server, as deploy/nginx.conf has it and in other common ways: page and API."""

import shutil
import socket
import ssl
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from helpers.servers import (
    URIS,
    build_searcher,
    error_of,
    start_server,
    wait_until,
    write_certificate,
)
from helpers.shapes import write_shape_pictures

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
NAME = "photos.example.org"
PREFIX = "/photos"
QUOTED = (Path(__file__).parents[2] / "deploy" / "nginx.conf").read_text(encoding="utf-8")

MAIN = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {servers}
}}
"""
PORT_DROPPED = "proxy_set_header Host $host;"


@dataclass(frozen=True)
class Way:
    prefix: str = ""
    root_path: bool = False
    plain: tuple[str, str] | None = None


WAYS = {
    "documented": Way(),
    "documented-prefix": Way(PREFIX, root_path=True),
    "bare": Way(plain=("", "")),
    "host-without-port": Way(plain=("", PORT_DROPPED)),
    "prefix-removed": Way(PREFIX, plain=("/", "")),
    "prefix-kept": Way(PREFIX, root_path=True, plain=("", PORT_DROPPED)),
}


def free_ports(count):
    with ExitStack() as opened:
        sockets = [
            opened.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [listener.getsockname()[1] for listener in sockets]


def configured(way, number, port, plain_port, backend, certificate):
    if way.plain is not None:
        path, settings = way.plain
        location = f"location {way.prefix}/ {{ proxy_pass http://{backend}{path}; {settings} }}"
        return f"server {{ listen 127.0.0.1:{port}; {location} }}"
    changes = {
        "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
        "listen 80;": f"listen 127.0.0.1:{plain_port};",
        "bridgetower_conn": f"bridgetower_conn{number}",
        "bridgetower_req": f"bridgetower_req{number}",
        "/etc/ssl/photos.example.org.": f"{certificate.with_suffix('')}.",
        "127.0.0.1:8000": backend,
        "upstream bridgetower": f"upstream bridgetower{number}",
        "http://bridgetower": f"http://bridgetower{number}",
        **({"location / {": f"location {way.prefix}/ {{"} if way.prefix else {}),
    }
    text = QUOTED
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def proxied_searcher(predictor, tmp_path_factory):
    return build_searcher(write_shape_pictures(tmp_path_factory.mktemp("indexed")), predictor)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if NGINX is None or shutil.which("openssl") is None:
        pytest.skip(
            "NO NGINX, THE SERVER IS NOT TESTED BEHIND A PROXY: apt-get install nginx-light openssl"
        )
    return write_certificate(tmp_path_factory.mktemp("tls"), NAME)


@pytest.fixture(scope="module")
def addresses(proxied_searcher, certificate, tmp_path_factory):
    if NGINX is None:
        pytest.skip(
            "NO NGINX, THE SERVER IS NOT TESTED BEHIND A PROXY: apt-get install nginx-light"
        )
    folder = tmp_path_factory.mktemp("nginx")
    # All at once: a port that is asked for later can be one of these, since nothing listens at them yet.
    all_ports = free_ports(2 * len(WAYS))
    ports = dict(zip(WAYS, all_ports, strict=False))
    plain_ports = dict(zip(WAYS, all_ports[len(WAYS) :], strict=True))
    trusting = {"page": True, "server_name": (NAME,), "forwarded_allow_ips": ("127.0.0.1",)}
    with (
        start_server(proxied_searcher.predictor, proxied_searcher, **trusting) as root,
        start_server(
            proxied_searcher.predictor, proxied_searcher, **trusting, root_path=PREFIX
        ) as prefixed,
    ):
        backends = {
            False: root.client.base_url.netloc.decode(),
            True: prefixed.client.base_url.netloc.decode(),
        }
        servers = [
            configured(
                way, number, ports[name], plain_ports[name], backends[way.root_path], certificate
            )
            for number, (name, way) in enumerate(WAYS.items())
        ]
        file = folder / "nginx.conf"
        file.write_text(MAIN.format(folder=folder, servers="\n".join(servers)))
        with subprocess.Popen([NGINX, "-p", str(folder), "-c", str(file)]) as nginx:
            try:
                wait_until(lambda: nginx.poll() is not None or (folder / "nginx.pid").exists())
                assert nginx.poll() is None
                sites = {
                    name: "http://127.0.0.1" if way.plain else f"https://{NAME}"
                    for name, way in WAYS.items()
                }
                yield {
                    name: f"{sites[name]}:{ports[name]}{way.prefix}" for name, way in WAYS.items()
                }
            finally:
                nginx.terminate()


@pytest.mark.parametrize("way", WAYS)
def test_page(addresses, browsed, way):
    with browsed(addresses[way], ignore_https_errors=True) as page:
        page.get_by_text("45 images can be searched").wait_for()
        page.get_by_label("Describe the image").fill("red circle on black")
        page.get_by_label("Describe the image").press("Enter")
        page.locator("#hits li:nth-child(24) img").wait_for()
        assert page.locator("#hits img").first.evaluate("image => image.naturalWidth") > 0
        assert page.locator("#hits").evaluate("list => getComputedStyle(list).display") == "grid"


@pytest.fixture(scope="module")
def proxied_client(certificate):
    trusted = ssl.create_default_context(cafile=str(certificate))
    with httpx.Client(verify=trusted, timeout=60) as client:
        yield client


@pytest.mark.parametrize("way", WAYS)
def test_api(addresses, proxied_client, way):
    address = httpx.URL(addresses[way])
    headers = {"Host": address.netloc.decode()}
    extensions = {"sni_hostname": address.host}
    here = str(address.copy_with(host="127.0.0.1"))

    def ask(path, body=None, **changes):
        method = "GET" if body is None else "POST"
        return proxied_client.request(
            method, here + path, json=body, headers=headers | changes, extensions=extensions
        )

    for path, body in (
        ("/v1/embeddings", {"input": "a red bar"}),
        ("/v1/search", {"query": "a red bar", "top": 3}),
        ("/v1/match", {"images": URIS[0], "texts": "a red bar"}),
    ):
        answer = ask(path, body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["data"]
    description = ask("/openapi.json").json()
    assert description.get("servers") == ([{"url": PREFIX}] if WAYS[way].root_path else None)
    error_of(ask("/v1/nothing"), 404)
    error_of(ask("/v1/embeddings", {"input": "a"}, **{"Sec-Fetch-Site": "cross-site"}), 403)
    error_of(ask("/v1/embeddings", {"input": "a"}, Origin="https://evil.example"), 403)
