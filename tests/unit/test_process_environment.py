"""What processes take from the environment (tokens, proxies) and from shared folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from research_rl.errors import ConfigError, ServiceError
from research_rl.process.private import private_folder, write_private
from research_rl.process.proxies import bypass_loopback, require_usable
from research_rl.process.tokens import token_from


@pytest.mark.parametrize(("text", "token"), [("abc\n", "abc"), (" abc\r\n", "abc"), ("", None), ("\n", None)])
def test_white_space_around_a_token_is_no_part_of_it(text: str, token: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", text)
    assert token_from("SOME_TOKEN") == token


@pytest.mark.parametrize("text", ["schlüssel", "two words", "a\tb", "a\x7f"])
def test_a_token_that_no_header_carries_is_refused_without_showing_it(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", text)
    with pytest.raises(ConfigError, match=r"SOME_TOKEN has the character U\+") as refused:
        token_from("SOME_TOKEN")
    assert text not in str(refused.value)


def test_loopback_is_added_to_what_bypasses_proxies() -> None:
    assert bypass_loopback({})["NO_PROXY"] == "127.0.0.1,localhost,::1"
    both = bypass_loopback({"NO_PROXY": "intranet, localhost", "no_proxy": ".example"})
    assert both["no_proxy"] == both["NO_PROXY"] == ".example,intranet,localhost,127.0.0.1,::1"


def test_a_socks_proxy_without_its_library_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://user:secret@127.0.0.1:1080")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ServiceError, match=r"ALL_PROXY names a socks5 proxy.*socksio.*unset") as refused:
        require_usable()
    assert "secret" not in str(refused.value)
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:3128")
    require_usable()


def test_a_private_file_is_readable_by_its_owner_alone_also_when_it_replaces_another(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "key"
    write_private(path, "old")
    path.chmod(0o644)
    write_private(path, "new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o600
    assert [item.name for item in path.parent.iterdir()] == ["key"]


def test_a_folder_that_all_could_write_is_made_private_and_a_link_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    assert private_folder(folder).stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ServiceError, match="is not a folder of user"):
        private_folder(tmp_path / "link")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a folder of another user")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    with pytest.raises(ServiceError, match=r"owner 12345.*TMPDIR"):
        private_folder(folder)
