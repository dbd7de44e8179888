"""The images of infra/, built for real: their base by debootstrap under the name that the Dockerfiles ask for, the rest from a checkout.

Images of others that infra/compose.yaml names cannot be had without a registry; docker/ has Dockerfiles that make those of Debian's and
PyPI's packages that hold the same servers.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import yaml

from research_rl.paths import CHECKOUT
from tests.infra.engine import SUITE, Engine, check
from tests.infra.mirror import Mirror

SERVICES = yaml.safe_load((CHECKOUT / "infra/compose.yaml").read_text())["services"]
BASE = re.findall(r"^FROM (\S+)", (CHECKOUT / "infra/docker/retriever.Dockerfile").read_text(), re.M)[0]
IN_BASE = "python3,python3-venv,ca-certificates"
PATH = "ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
OWN_TO_THIS_MACHINE = ("etc/apt/sources.list", "etc/resolv.conf", "etc/hostname", "var/log", "var/lib/apt/lists", "var/cache/apt")
# As Python's image has it: apt keeps no packages, and no cache with the addresses they came from.
CLEAN = 'Dir::Cache::pkgcache ""; Dir::Cache::srcpkgcache ""; DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb || true"; };\n'
HELD = (
    *(".env", ".netrc", "prefect.toml", "infra/.env", "tasks/.env", "research_rl/server.pem", "flows/id_ed25519"),
    *("requirements/keys.json", "configs/secrets.txt", ".dvc/config.local", ".services/stack/keys.json", ".venv/pyvenv.cfg"),
)
"""Files of a checkout in use that hold secrets."""


@dataclass(frozen=True)
class Image:
    """One image: the service of compose.yaml whose name it takes, its Dockerfile, and the stage of it."""

    service: str
    dockerfile: Path
    target: str | None = None
    ours: bool = True

    @property
    def tag(self) -> str:
        """Return the name under which compose.yaml asks for it."""
        return SERVICES[self.service]["image"]


STAND_INS = Path(__file__).parent / "docker"
RETRIEVER = Image("retriever", CHECKOUT / "infra/docker/retriever.Dockerfile")
PIPELINE = Image("prefect", CHECKOUT / "infra/docker/pipeline.Dockerfile", "pipeline")
WORKER = Image("worker", CHECKOUT / "infra/docker/pipeline.Dockerfile", "worker")
POSTGRES = Image("postgres", STAND_INS / "postgres.Dockerfile", ours=False)
S3 = Image("s3", STAND_INS / "s3.Dockerfile", ours=False)
PROMETHEUS = Image("prometheus", STAND_INS / "monitoring.Dockerfile", "prometheus", ours=False)
ALERTMANAGER = Image("alertmanager", STAND_INS / "monitoring.Dockerfile", "alertmanager", ours=False)


def build(engine: Engine, mirror: Mirror, image: Image, context: Path) -> None:
    """Build an image from the checkout `context`; one that stands and whose files are the same is built from the engine's cache."""
    make_base(engine, mirror)
    target = ["--target", image.target] if image.target else []
    folder = context if image.ours else STAND_INS
    names = ["--file", str(image.dockerfile), "--tag", image.tag]
    engine.docker("build", "--quiet", "--network", "host", *mirror.flags(), *target, *names, str(folder))


def make_base(engine: Engine, mirror: Mirror) -> None:
    """Make the image that the Dockerfiles begin with: Debian 12 and its Python 3.11."""
    if engine.docker("image", "ls", "--quiet", BASE).strip():
        return
    root = engine.folder / "base"
    shutil.rmtree(root, ignore_errors=True)
    check("debootstrap", "--variant=minbase", f"--include={IN_BASE}", SUITE, str(root), mirror.apt, env=engine.env)
    for name in OWN_TO_THIS_MACHINE:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if name.startswith("var/"):
            path.mkdir()
    (root / "etc/apt/apt.conf.d/docker-clean").write_text(CLEAN)
    (root / "usr/bin/python").symlink_to("python3.11")
    with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as packed:
        done = subprocess.run(["docker", "import", "--change", PATH, "-", BASE], env=engine.env, stdin=packed.stdout, capture_output=True)
    assert packed.returncode == done.returncode == 0, done.stderr[-2000:]
    shutil.rmtree(root)


def plant(folder: Path, secret: str) -> Path:
    """Copy the checkout's own files to `folder`, with `secret` in every kind of file that may hold one; return the folder."""
    for name in check("git", "ls-files", cwd=CHECKOUT).splitlines():
        if (source := CHECKOUT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name, follow_symlinks=False)
    for name in HELD:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"PASSWORD={secret}\n")
    return folder


def size(engine: Engine, image: Image) -> int:
    """Return the bytes of an image with its base."""
    return int(engine.docker("image", "inspect", "--format", "{{.Size}}", image.tag))


def leaks(engine: Engine, image: Image, texts: list[str]) -> list[str]:
    """Return `FILE: TEXT` for each file of each layer, and for the image's own description, that holds one of the texts."""
    # A text that every image holds: a search that does not find it sees nothing.
    control = (CHECKOUT / "research_rl/retriever/command.py").read_text().splitlines()[0]
    with subprocess.Popen(["docker", "save", image.tag], env=engine.env, stdout=subprocess.PIPE) as saved:
        files = _files(saved.stdout)
        found = [(name, text) for name, content in files for text in (*texts, control) if text.encode() in content or text in name]
    assert saved.returncode == 0 and ("app/research_rl/retriever/command.py", control) in found
    return [f"{name}: {text}" for name, text in found if text != control]


def _files(archive: IO[bytes] | None) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of each file of an image's archive; a layer is an archive in it."""
    with tarfile.open(fileobj=archive, mode="r|") as members:
        for member in members:
            content = members.extractfile(member) if member.isfile() else None
            if member.name.endswith("layer.tar"):
                yield from _files(content)
            else:
                yield member.name, content.read() if content else member.linkname.encode()
