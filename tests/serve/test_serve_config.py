"""Settings that cannot work are refused with what to do."""

import pytest

from bridgetower import cli
from bridgetower.cli.serve import with_environment
from bridgetower.serve.config import ServeConfig, is_loopback


def test_impossible_settings():
    for settings, message in (
        ({"max_batch": 0}, "max_batch is 0; expected at least 1"),
        *(({"timeout": seconds}, "expected more than 0") for seconds in (0.0, -1.0)),
        ({"timeout": float("nan")}, "timeout is nan; expected a number"),
        ({"port": 65536}, "port is 65536; expected a whole number from 0 to 65,535"),
        ({"api_key": ""}, "API key is empty"),
        *(({"api_key": key}, "begins or ends with a space") for key in (" abc", "abc ")),
        ({"api_key": "schlüssel"}, "cannot be sent"),
        ({"allow_host": ("https://example.org",)}, "expected a name such as images.example.org"),
        (
            {"server_name": ("photos.example.org:80",)},
            "expected a name such as photos.example.org, without a port",
        ),
        ({"root_path": "/photos/"}, "root_path has '/photos/'; expected a prefix such as /photos"),
        ({"root_path": "photos"}, "without a slash at its end"),
        *(
            ({"forwarded_allow_ips": (ip,)}, "expected an address or a network")
            for ip in ("10.0.0.1/8", "*")
        ),
        (
            {"cors_origin": ("*",)},
            "expected a site such as https://app.example.org, without a path",
        ),
        ({"cors_origin": ("https://app.example.org/",)}, "expected a site"),
        (
            {"max_items": 4097, "queue": 5000},
            "max_items is 4097; expected a whole number from 1 to 4,096",
        ),
        ({"queue": 0}, "queue is 0; expected"),
    ):
        with pytest.raises(ValueError, match=message):
            ServeConfig(**settings)


def test_nothing_is_open_or_shown_by_default():
    config = ServeConfig(api_key="secret")
    assert is_loopback(config.host)
    assert config.allow_host == ()
    assert "secret" not in repr(config)


def test_addresses_of_this_machine():
    for hosts, expected in (
        (("127.0.0.1", "127.1.2.3", "::1", "localhost"), True),
        (("0.0.0.0", "::", "192.168.0.1", "example.org", ""), False),
    ):
        assert [is_loopback(host) for host in hosts] == [expected] * len(hosts)


def test_options_from_the_environment():
    variables = {
        "MAX_BATCH": "32",
        "PAGE": "false",
        "ACCESS_LOG": "true",
        "ALLOW_HOST": "a.example,b.example",
    }
    variables |= {"INDEX": "photos.lance", "PORT": "1", "DEVICE": "cpu", "FAST_DECODE": "false"}
    environment = {f"BRIDGETOWER_SERVE_{name}": value for name, value in variables.items()}
    # as where a file for Docker passes on what is not set
    environment["BRIDGETOWER_SERVE_NAME"] = ""
    # as Kubernetes sets for a service of this name
    environment["BRIDGETOWER_PORT"] = "tcp://10.0.0.1:80"
    arguments = with_environment(["--port", "2", "--max_batch=8", "--fast-decode"], environment)
    assert arguments[:4] == ["--port", "2", "--max_batch=8", "--fast-decode"]
    expected = [
        "--index",
        "photos.lance",
        "--allow-host",
        "a.example",
        "b.example",
        "--no-page",
        "--access-log",
    ]
    assert arguments[4:] == [*expected, "--device", "cpu"]
    with pytest.raises(ValueError, match="BRIDGETOWER_SERVE_PAGE is 'no'; expected true or false"):
        with_environment([], {"BRIDGETOWER_SERVE_PAGE": "no"})


@pytest.mark.parametrize(
    ("name", "near"), [("MAX_BACH", "MAX_BATCH"), ("FAST_DECODING", "FAST_DECODE")]
)
def test_a_misspelt_variable_is_refused(name, near, capsys, monkeypatch):
    monkeypatch.setenv(f"BRIDGETOWER_SERVE_{name}", "")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["serve", "--model", "none"])
    assert (
        f"there is no BRIDGETOWER_SERVE_{name}; did you mean BRIDGETOWER_SERVE_{near}? "
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit, match="0"):
        cli.main(["serve", "--help"])


def test_every_option_has_a_variable():
    options = [
        name for name in cli._known_options("serve") if not name.startswith(("--no-", "--help"))
    ]
    for name in options:
        variable = "BRIDGETOWER_SERVE_" + name.removeprefix("--").replace("-", "_").upper()
        assert with_environment([], {variable: "true"})[:1] == [name]
    assert len(options) > 30


def test_the_first_argument_is_an_index_or_a_model():
    for name, option in (
        ("photos.lance", "--index"),
        ("s3://a/b.lance/", "--index"),
        ("me/tiny", "--model"),
    ):
        assert with_environment([name, "--port", "0"], {}) == [option, name, "--port", "0"]
