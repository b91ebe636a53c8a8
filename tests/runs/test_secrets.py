from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from denoiselab.runs.secrets import (
    RedactingFormatter,
    argument_secrets,
    changed_keys,
    config_secrets,
    environment_secrets,
    is_secret_name,
    redact,
    redact_arguments,
    redact_text,
    redact_yaml,
)

CONF = Path(__file__).parents[2] / "conf"
SECRET = [
    *["token", "hf_token", "HF_TOKEN", "accessToken", "logger.auth_token", "github-token", "HFTOKEN", "token_2"],
    *["api_key", "apikey", "apiKey", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "access_key", "private_key", "ssh_key"],
    *["password", "PASSWORD", "passwd", "DB_PASSWORD", "PGPASSWORD", "db.password", "MYSQL_PWD", "passphrase"],
    *["secret", "client_secret", "secrets", "credential", "credentials", "basic_auth", "auth", "Authorization"],
    *["GITHUB_PAT", "SLURM_JWT", "cookie", "slack_webhook_url", "credentials.user"],
]
ORDINARY = [
    *[
        "num_tokens",
        "tokens",
        "max_tokens",
        "token_dim",
        "class_token",
        "mask_token",
        "tokenizer",
        "TOKENIZERS_PARALLELISM",
    ],
    *["key", "keys", "keep", "monkey", "keyboard", "key_dim", "query_key_norm", "image_key", "cache_key"],
    *["author", "authors", "patch_size", "path", "PWD", "OLDPWD", "pass", "passes", "bypass", "compass", "secretary"],
    *["SSH_AUTH_SOCK", "token_file", "credentials_path", "XAUTHORITY", "pattern", "lr", "weights", "name", ""],
]
KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("name", SECRET)
def test_names_of_secrets(name):
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_names(name):
    assert not is_secret_name(name)


def keys_of(value):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from keys_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner)


def test_no_config_of_this_project_looks_like_a_secret():
    files = sorted(CONF.rglob("*.yaml"))
    assert len(files) > 100
    for file in files:
        value = yaml.safe_load(file.read_text())
        assert [key for key in keys_of(value) if is_secret_name(key)] == [], file
        assert redact(value, []) == value, file
        assert redact_yaml(file.read_text(), []) == file.read_text(), file


def test_secrets_of_the_environment(tmp_path):
    path = tmp_path / "key.json"
    path.touch()
    found = environment_secrets(
        {
            "WANDB_API_KEY": KEY,
            "AWS_ACCESS_KEY_ID": "an-id-of-a-key",
            "STORAGE_KEY": "any-key-counts",
            "DEPLOY_TOKEN_OF_CI": "token-in-the-middle",
            "HTTPS_PROXY": "http://me:proxy-password@proxy:8080",
            "SIGNING_PRIVATE_KEY": "first line\nsecond line\n",
            "SHORT_TOKEN": "abc",
            "USE_AUTH": "true",
            "GOOGLE_APPLICATION_CREDENTIALS": str(path),
            "SSH_AUTH_SOCK": "/somewhere/agent.1",
            "TOKENIZERS_PARALLELISM": "disabled",
            "HOME": "/home/somebody",
            "PASSWORD": "",
        }
    )
    assert found == [
        KEY,
        "an-id-of-a-key",
        "any-key-counts",
        "token-in-the-middle",
        "proxy-password",
        "first line",
        "second line",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"refused: {KEY}!", "refused: ***!"),
        ("broken over\n lines: two words-here", "broken over\n lines: ***"),
        ("broken over lines: two\n   words-here", "broken over lines: ***"),
        ("https://user:token@host/a", "https://***@host/a"),
        ("https://user:p@ss@host/a", "https://***@host/a"),
        ("ssh://abcdef@host and mail to a@b.c", "ssh://***@host and mail to a@b.c"),
        ("https://host/a?who=a@b", "https://host/a?who=a@b"),
        ("header Bearer abcdefghijkl", "header Bearer ***"),
        ("Authorization: Basic YWJjOmRlZg==", "Authorization: Basic ***"),
        ("config error: logger.api_key=abc: no such key", "config error: logger.api_key=***: no such key"),
        ("+db={user:a,password:b c}", "+db={user:a,password:*** c}"),
        ("https://host/?access_token=abc&x=1", "https://host/?access_token=***&x=1"),
        ("{'password': 'a \"b\" c', 'x': 1}", "{'password': '***', 'x': 1}"),
        ('{"token": "a\\"b"}', '{"token": "***"}'),
        ("password: correct-horse", "password: ***"),
        ("token: must be text", "token: must be text"),
        ("token=null api_key=${oc.env:API_KEY} secret=true", "token=null api_key=${oc.env:API_KEY} secret=true"),
        ("num_tokens=128 monkey=banana keys=[a,b]", "num_tokens=128 monkey=banana keys=[a,b]"),
        ("see hf_abcdefghijklmnopqrstuvwx", "see ***"),
        ("a AKIAABCDEFGHIJKLMNOP b", "a *** b"),
        ("a sk-proj-abcdefghij_klmn0pqrst b", "a *** b"),
        ("a task-of-which-there-are-many b", "a task-of-which-there-are-many b"),
        (f"a eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOi{'I' * 5000}xMjM.{'s' * 43} b", "a *** b"),
        ("x -----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY----- y", "x *** y"),
        ("commit 617068f2a0d0c1b2a3948576a0b1c2d3e4f50617", "commit 617068f2a0d0c1b2a3948576a0b1c2d3e4f50617"),
    ],
)
def test_text(text, expected):
    once = redact_text(text, [KEY, "two words-here"])
    assert once == expected
    assert redact_text(once, [KEY, "two words-here"]) == once


def test_a_secret_is_found_however_it_is_written():
    odd = 'it\'s "odd"\\ & 100% ünsafe'
    written_as_yaml = yaml.dump(odd, allow_unicode=True)
    in_a_url = "it%27s%20%22odd%22%5C%20%26%20100%25%20%C3%BCnsafe"
    for written in (odd, json.dumps(odd), repr(odd), written_as_yaml, in_a_url):
        assert "odd" not in redact_text(written, [odd]), written


def test_long_texts_do_not_take_for_ever():
    program = "import sys; from denoiselab.runs.secrets import redact_text; redact_text(sys.argv[1] * 50_000, ())"
    for unit in ("sk-", "eyJ-", "eyJaaaaaaaaaa.eyJ-", "token=${", "token: "):
        subprocess.run([sys.executable, "-c", program, unit], check=True, timeout=60)


def test_the_environment_is_the_default(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "from-the-environment")
    assert redact_text("x from-the-environment") == "x ***"
    assert redact(["x from-the-environment"]) == ["x ***"]
    assert redact_arguments(["notes=from-the-environment"]) == ["notes=***"]
    assert redact_text("x from-the-environment", []) == "x from-the-environment"


def test_nested_data():
    config = {
        "logger": {
            "api_key": "abcdefgh",
            "notes": "with abcdefgh in it",
            "mode": None,
            "token": None,
            "use_auth": True,
        },
        "credentials": {"user": "me", "list": [1, 2]},
        "pins": [{"password": 1234}],
        "root": "https://u:t@host/a",
        "hub": {"token": "${oc.env:HF_TOKEN}", "_target_": "tools.abcdefgh"},
        "betas": (0.9, 0.999),
        3: 1e-9,
    }
    before = json.dumps(config)
    found = redact(config, [])
    assert found == {
        "logger": {"api_key": "***", "notes": "with *** in it", "mode": None, "token": None, "use_auth": True},
        "credentials": "***",
        "pins": [{"password": "***"}],
        "root": "https://***@host/a",
        "hub": {"token": "${oc.env:HF_TOKEN}", "_target_": "tools.abcdefgh"},
        "betas": (0.9, 0.999),
        3: 1e-9,
    }
    assert json.dumps(config) == before
    assert redact(found, []) == found
    assert changed_keys(config, found) == ["logger.api_key", "logger.notes", "credentials", "pins", "root"]
    assert changed_keys(found, found) == []
    assert config_secrets(config) == ["abcdefgh"]  # the others are short


def test_command_lines():
    typed = [
        "+logger.api_key=abc",
        "++db.password=a b,c",
        "hub.token='quoted one'",
        "logger.notes=the quoted one",
        "x={api_key:abc,y:1}",
        "~hub.token",
        "token=null",
        "seed=3",
        "-m",
        "--password=xyz",
    ]
    assert redact_arguments(typed, []) == [
        "+logger.api_key=***",
        "++db.password=***",
        "hub.token=***",
        "logger.notes=the ***",
        "x={api_key:***,y:1}",
        "~hub.token",
        "token=null",
        "seed=3",
        "-m",
        "--password=***",
    ]
    assert argument_secrets(typed) == ["'quoted one'", "quoted one"]


def test_printed_yaml():
    config = {
        "token": "a b " * 60,  # broken over several lines
        "logger": {"credentials": ["one", "two"], "text": "x", "api_key": {"deep": {"er": "three"}}, "password": None},
        "list": [{"password": "four\n\nfive\n", "after": 1}, "six"],
        "hub": {"token": "${oc.env:HF_TOKEN}"},
    }
    printed = f"# Config\n{yaml.dump(config, sort_keys=False)}\n--- end\n"
    assert yaml.safe_load(redact_yaml(printed, []).replace("--- end", "")) == {
        "token": "***",
        "logger": {"credentials": "***", "text": "x", "api_key": "***", "password": None},
        "list": [{"password": "***", "after": 1}, "six"],
        "hub": {"token": "${oc.env:HF_TOKEN}"},
    }
    assert redact_yaml(printed, []).endswith("--- end\n")


def test_logs(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "from-the-environment")
    formatter = RedactingFormatter("%(levelname)s %(message)s")
    try:
        raise RuntimeError("refused: from-the-environment")
    except RuntimeError as error:
        trouble = (RuntimeError, error, error.__traceback__)
    record = logging.LogRecord("n", logging.ERROR, "f", 1, "with %s", ("password=abc",), trouble)
    written = formatter.format(record)
    assert written.startswith("ERROR with password=***\nTraceback")
    assert written.endswith("RuntimeError: refused: ***")
