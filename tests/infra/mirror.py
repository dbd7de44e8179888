"""What a build needs to know of this machine's package settings, as files that are mounted into it and stay in no layer.

Folders that pip's settings name are served over loopback, since a build sees no folder of this machine.
"""

from __future__ import annotations

import functools
import http.server
import runpy
import secrets
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from research_rl.paths import CHECKOUT
from tests.infra.engine import SUITE, apt_address, check

CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
SERVED = ("extra-index-url", "index-url", "find-links")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of requests."""


@dataclass(frozen=True)
class Mirror:
    """Files to mount, by the id of the secret that the Dockerfiles ask for, and the texts that no layer may hold."""

    files: dict[str, Path]
    apt: str
    private: list[str] = field(default_factory=list[str])

    def flags(self) -> list[str]:
        """Return docker build's flags."""
        return [word for name, path in self.files.items() for word in ("--secret", f"id={name},src={path}")]


@contextmanager
def mirror(folder: Path) -> Generator[Mirror]:
    """Serve pip's folders on a free port of loopback and write the files below `folder`."""
    links = folder / "served"
    links.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(links)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield _written(folder, links, f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()


def _written(folder: Path, links: Path, address: str) -> Mirror:
    listed = check(sys.executable, "-m", "pip", "config", "list")
    settings: dict[str, str] = runpy.run_path(str(CHECKOUT / "requirements/install.py"))["pip_settings"](listed)
    certificate = settings.pop("cert", None)
    # An index that is in no other file, so that a test can tell whether its address stayed anywhere.
    token = secrets.token_hex(12)
    (links / token).mkdir()
    texts = {name: " ".join(_served(item, links, address) for item in settings[name].split()) for name in SERVED if name in settings}
    texts["extra-index-url"] = f"{texts.get('extra-index-url', '')} {address}/{token}".strip()
    texts |= {name: settings[name] for name in ("trusted-host", "timeout", "default-timeout") if name in settings}
    texts |= {"cert": CERTIFICATES} if certificate else {}
    (folder / "pip.conf").write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in texts.items()))
    apt = apt_address()
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    sources = f"# {token}\nTypes: deb\nURIs: {apt}\nSuites: {SUITE}\nComponents: main\nSigned-By: {keyring}\n"
    (folder / "debian.sources").write_text(sources)
    files = {"pip": folder / "pip.conf", "apt": folder / "debian.sources"} | ({"certificates": Path(certificate)} if certificate else {})
    hosts = [urlsplit(item).netloc for name in ("index-url", "extra-index-url") for item in texts.get(name, "").split()]
    return Mirror(files, apt, sorted({token, *hosts}))


def _served(place: str, links: Path, address: str) -> str:
    """Return the address of a folder's files over loopback; an index's neighbours belong to it, for its pages lead there."""
    path = Path(place.removeprefix("file://"))
    if not path.is_absolute():
        return place
    top = path.parent if path.name == "simple" else path
    link = links / str(len(list(links.iterdir())))
    link.symlink_to(top)
    return f"{address}/{link.name}/{path.relative_to(top)}".removesuffix("/.") + "/"
