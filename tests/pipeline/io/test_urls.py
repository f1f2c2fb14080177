"""URLs: secrets are not shown, programs and passwords are refused."""

from __future__ import annotations

import pytest

from pipeline.errors import UserError
from pipeline.io import urls


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/what?.jsonl", "s3://bucket/what?.jsonl"),
        ("/a/b?c#d", "/a/b?c#d"),
        ("https://u:p@host/x.gz?sig=1#f", "https://host/x.gz"),
        ("simplecache::https://host/x?sig=1", "simplecache::https://host/x"),
    ],
)
def test_public_urls(url: str, shown: str) -> None:
    assert urls.public_url(url) == shown


@pytest.mark.parametrize("url", ["https://user:HUSH@host/x", "sftp://user:HUSH@host/x", "https://HUSH@host/x"])
def test_passwords_in_urls_are_refused(url: str) -> None:
    with pytest.raises(UserError, match="put credentials into the environment") as raised:
        urls.check_url(url)
    assert "HUSH" not in str(raised.value)


def test_other_urls_are_accepted() -> None:
    for url in ("sftp://user@host/x", "s3://bucket/a@b:c", "/data/x:y@z", "https://host/a@b:c"):
        assert urls.check_url(url) == url


@pytest.mark.parametrize("url", ["pipe:cat /etc/passwd", "simplecache::pipe:ls"])
def test_pipe_urls_are_refused(url: str) -> None:
    with pytest.raises(UserError, match="run a shell and are refused"):
        urls.check_url(url)
