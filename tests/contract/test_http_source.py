"""Source http against a web server that drops, truncates, refuses and lies: the bytes are right or the run fails with a reason."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from research_rl.config import Config
from research_rl.data import download, flashrag
from research_rl.errors import ConfigError, DataError
from research_rl.pipeline import manifest
from research_rl.pipeline.run import run_stage
from research_rl.pipeline.stages import STAGES, Context, Progress, Workspace, silent
from research_rl.validation.stage import QualityError
from tests import defects
from tests.web import Site, localhost_is_public, serve

ROWS = 12_000
CORPUS = b"".join(json.dumps({"id": str(n), "contents": f"passage {n} " + "x" * (n % 597)}).encode() + b"\n" for n in range(ROWS))
QUESTION = b'{"id": "dev_0", "question": "Who?", "golden_answers": ["Ada"], "metadata": {}}\n'


@pytest.fixture
def site() -> Iterator[Site]:
    with serve(Site({"corpus.jsonl": CORPUS, "musique/dev.jsonl": QUESTION})) as started:
        yield started


def context(root: Path, site: Site, told: list[str] | None = None, transfer: dict[str, Any] | None = None, **data: Any) -> Context:
    named = {"train": ["musique/dev.jsonl"], "dev": ["musique/dev.jsonl"], "test": ["musique/dev.jsonl"]}
    tree = {"source": "http", "url": site.url, **named, **data}
    config = Config.model_validate({"data": tree, "transfer": {"piece_mb": 1, "timeout_s": 5, **(transfer or {})}})
    progress = silent if told is None else lambda text, _: told.append(text)
    return Context(STAGES["download"], config, Workspace(root), {}, progress)


def whole(root: Path) -> manifest.Manifest:
    """Return the manifest after checking that data/ holds exactly what the site has."""
    assert [p.id for p in flashrag.read_passages(root / "data/corpus.jsonl")] == [str(n) for n in range(ROWS)]
    return manifest.load(root / "data")


def test_drops_refusals_and_wrong_lengths_cost_only_what_was_lost(site: Site, tmp_path: Path) -> None:
    draw = random.Random(7)
    faults: list[tuple[str, Any]] = [("drop", draw.randrange(400_000)) for _ in range(8)]
    faults += [("status", 503), ("status", 429), ("short", 1), ("short", 5_000), ("long", 10)]
    draw.shuffle(faults)
    site.faults["corpus.jsonl"] = deque(faults)
    told: list[str] = []
    # A busy machine may send nothing for seconds; what is given up then is no fault of this site.
    download.run(context(tmp_path, site, told, {"timeout_s": 120}))
    found = whole(tmp_path)
    assert not site.faults["corpus.jsonl"], "every fault was met"
    # Each reply that ends too early, the two short ones and the long one included, costs less than one block.
    assert len(CORPUS) <= site.sent["corpus.jsonl"] <= len(CORPUS) + 11 * 65_536
    assert found.facts["source"]["files"]["corpus.jsonl"]["sha256"] == hashlib.sha256(CORPUS).hexdigest()
    assert found.facts["source"]["url"] == site.url
    assert not (tmp_path / "artifacts/.work/download").exists()
    assert any(" MB/s" in text and "of 2 files" in text for text in told)


def test_a_server_without_ranges_is_read_from_the_start_again(site: Site, tmp_path: Path) -> None:
    site.ranges = False
    site.faults["corpus.jsonl"] = deque([("drop", 100_000), ("drop", 300_000)])
    download.run(context(tmp_path, site))
    whole(tmp_path)
    assert [start for name, start in site.asked if name == "corpus.jsonl"] == [0, 0, 0]


def test_without_a_version_nothing_is_continued(site: Site, tmp_path: Path) -> None:
    site.etags = False
    site.faults["corpus.jsonl"] = deque([("drop", 100_000)])
    download.run(context(tmp_path, site))
    whole(tmp_path)
    assert [start for name, start in site.asked if name == "corpus.jsonl"] == [0, 0]


def test_a_version_that_changes_meanwhile_is_never_mixed(site: Site, tmp_path: Path) -> None:
    old = CORPUS.replace(b"passage", b"Passage")
    site.files["corpus.jsonl"] = old
    site.faults["corpus.jsonl"] = deque([("drop", 50_000), ("change", CORPUS)])
    download.run(context(tmp_path, site))
    whole(tmp_path)
    assert b"Passage" not in (tmp_path / "data/corpus.jsonl").read_bytes()


def test_wrong_content_is_refused_named_and_fetched_again(site: Site, tmp_path: Path) -> None:
    site.faults["corpus.jsonl"] = deque([("content", b"\0")])
    told: list[str] = []
    right = hashlib.sha256(CORPUS).hexdigest()
    download.run(context(tmp_path, site, told, sha256={"corpus.jsonl": right}))
    whole(tmp_path)
    assert any("corpus.jsonl has sha256" in text and "fetching it again (2 of 5)" in text for text in told)


def test_content_that_stays_wrong_is_an_error_with_both_hashes(site: Site, tmp_path: Path) -> None:
    wrong = "0" * 64
    with pytest.raises(DataError, match=r"refused after 2 fetches") as caught:
        download.run(context(tmp_path, site, sha256={"musique/dev.jsonl": wrong}, transfer={"attempts": 2}))
    assert wrong in str(caught.value) and hashlib.sha256(QUESTION).hexdigest() in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_what_was_fetched_before_an_error_is_not_fetched_again(site: Site, tmp_path: Path) -> None:
    site.faults["corpus.jsonl"] = deque([("status", 500)] * 3)
    with pytest.raises(DataError, match=r"500 .*gave up after 2 tries without progress"):
        download.run(context(tmp_path, site, transfer={"attempts": 2, "parallel": 1}))
    sent = site.sent["musique/dev.jsonl"]
    assert sent >= len(QUESTION), "the smaller file comes first"
    site.faults.clear()
    download.run(context(tmp_path, site))
    whole(tmp_path)
    assert site.sent["musique/dev.jsonl"] == sent


def test_a_whole_address_and_a_further_file_of_parts(site: Site, tmp_path: Path) -> None:
    site.files |= {"index/part_aa": b"abc" * 1000, "index/part_ab": b"def", "index/notes.gz": gzip.compress(b"notes")}
    named = {"flat.index": ["index/part_aa", f"{site.url}/index/part_ab"], "notes": ["index/notes.gz"], "raw.gz": ["index/notes.gz"]}
    download.run(context(tmp_path, site, corpus=f"{site.url}/corpus.jsonl?download=1", files=named))
    found = whole(tmp_path)
    assert (tmp_path / "data/files/flat.index").read_bytes() == b"abc" * 1000 + b"def"
    assert (tmp_path / "data/files/notes").read_bytes() == b"notes"
    assert gzip.decompress((tmp_path / "data/files/raw.gz").read_bytes()) == b"notes"
    assert "files/flat.index" in [entry.path for entry in found.files]


def test_equal_sources_give_equal_bytes_however_they_were_fetched(site: Site, tmp_path: Path) -> None:
    download.run(context(tmp_path / "a", site))
    site.faults["corpus.jsonl"] = deque([("drop", 77_777)] * 3)
    download.run(context(tmp_path / "b", site, transfer={"parallel": 1, "piece_mb": 9}))
    for path in (tmp_path / "a/data").iterdir():
        assert path.read_bytes() == (tmp_path / "b/data" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"corpus": "no.jsonl"}, DataError, "no.jsonl: 404 Not Found; correct"),
        ({"url": None}, ConfigError, "data.url=None is no root"),
        ({"url": "http://127.0.0.1:9"}, DataError, "127.0.0.1:9.* gave up after 2 tries; check the address"),
        ({"corpus": "../x.jsonl"}, ConfigError, "leaves the root"),
        ({"corpus": "ftp://x/y.jsonl"}, ConfigError, "is no address"),
        ({"sha256": {"other": "0"}}, ConfigError, "not among the files"),
        ({"sha256": {"corpus.jsonl": "abc"}}, ConfigError, "'abc' for corpus.jsonl is no sha256"),
        ({"files": {"../x": ["corpus.jsonl"]}}, ConfigError, "below data/files"),
    ],
)
def test_a_wrong_source_is_named(site: Site, tmp_path: Path, change: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        download.run(context(tmp_path, site, transfer={"attempts": 2}, **change))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_a_full_disk_is_foreseen(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from research_rl.data import transfer

    usage = transfer.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(DataError, match=r"GB are needed below .* to fetch, about .* are free; free .* larger disk"):
        download.run(context(tmp_path, site))
    assert site.sent == {}


def test_an_unforeseen_error_in_a_thread_ends_the_download(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is neither of the source nor of the disk is raised as it is; no thread waits for the one that met it."""

    def defective(*_: object) -> str:
        raise LookupError("a defect")

    monkeypatch.setattr("research_rl.data.pieces.PartialFile.finish", defective)
    with pytest.raises(LookupError, match="a defect"):
        download.run(context(tmp_path, site))
    assert not (tmp_path / "data").exists()


def test_two_spellings_of_a_file_are_one_fetch(site: Site, tmp_path: Path) -> None:
    names = {"a": ["corpus.jsonl"], "b": [f"{site.url}/corpus.jsonl"], "c": [f"{site.url}/musique/dev.jsonl"]}
    for attempt in range(3):
        site.sent.clear()
        download.run(context(tmp_path / str(attempt), site, files=names, transfer={"parallel": 8}))
        assert site.sent == {"corpus.jsonl": len(CORPUS), "musique/dev.jsonl": len(QUESTION)}
        assert (tmp_path / f"{attempt}/data/files/b").read_bytes() == CORPUS


def test_two_spellings_of_a_file_cannot_have_two_hashes(site: Site, tmp_path: Path) -> None:
    hashes = {"corpus.jsonl": "0" * 64, f"{site.url}/corpus.jsonl": "1" * 64}
    with pytest.raises(ConfigError, match="which are one file"):
        download.run(context(tmp_path, site, files={"again": [f"{site.url}/corpus.jsonl"]}, sha256=hashes))


def test_two_downloads_into_one_workspace_do_not_meet(site: Site, tmp_path: Path) -> None:
    from research_rl.data import transfer

    with transfer.locked(tmp_path / "artifacts/.work/download"), pytest.raises(DataError, match="another process downloads"):
        download.run(context(tmp_path, site))


def test_content_that_the_server_compressed_is_read(site: Site, tmp_path: Path) -> None:
    """Content-Encoding is a compression on top of the name; a .gz file whose own compression is named there is left as it is."""
    site.files |= {"corpus.jsonl": gzip.compress(CORPUS), "notes": gzip.compress(b"notes"), "raw.gz": gzip.compress(b"raw")}
    site.headers = {name: {"Content-Encoding": "gzip"} for name in ("corpus.jsonl", "notes", "raw.gz")}
    download.run(context(tmp_path, site, files={"notes": ["notes"], "both": ["notes", "raw.gz"], "raw.gz": ["raw.gz"]}))
    whole(tmp_path)
    assert (tmp_path / "data/files/notes").read_bytes() == b"notes"
    assert (tmp_path / "data/files/both").read_bytes() == b"notes" + site.files["raw.gz"]
    assert gzip.decompress((tmp_path / "data/files/raw.gz").read_bytes()) == b"raw"
    site.headers = {"corpus.jsonl": {"Content-Encoding": "br"}}
    with pytest.raises(DataError, match="Content-Encoding br; store it plain"):
        download.run(context(tmp_path / "br", site))


def test_a_redirect_to_an_internal_address_is_refused(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site.redirects = {"moved.jsonl": f"{site.url}/corpus.jsonl"}
    download.run(context(tmp_path / "inside", site, corpus="moved.jsonl"))
    whole(tmp_path / "inside")
    localhost_is_public(monkeypatch)
    with pytest.raises(DataError, match=r"redirects to the internal address 127\.0\.0\.1"):
        download.run(context(tmp_path, site, url=site.url.replace("127.0.0.1", "localhost"), corpus="moved.jsonl"))


def test_only_a_configured_proxy_is_used(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    download.run(context(tmp_path, site))
    with pytest.raises(DataError, match="gave up after 1 tries"):
        download.run(context(tmp_path / "again", site, transfer={"proxy": "http://127.0.0.1:9", "attempts": 1}))


def test_a_very_long_name_is_fetched(site: Site, tmp_path: Path) -> None:
    site.files["x" * 250 + ".jsonl.gz"] = gzip.compress(CORPUS)
    download.run(context(tmp_path, site, corpus="x" * 250 + ".jsonl.gz"))
    whole(tmp_path)


def bodies(site: Site) -> dict[str, int]:
    """Return the bytes sent of each file since the last call."""
    sent, site.sent = site.sent, {}
    return sent


def test_a_refresh_asks_the_source_and_fetches_what_changed(site: Site, tmp_path: Path) -> None:
    """The artifact is current while its configuration is unchanged: a scheduled update never asked, and brought nothing up to date."""
    made = context(tmp_path, site)
    first, _ = run_stage("download", made.config, made.workspace)
    bodies(site)
    told: list[str] = []
    tell: Progress = lambda text, _: told.append(text)  # noqa: E731
    assert run_stage("download", made.config, made.workspace, refresh=True, progress=tell) == (first, False)
    assert sum(bodies(site).values()) <= len(site.files), "a byte a file says its version"
    site.files["corpus.jsonl"] = CORPUS.replace(b"passage", b"Passage")
    assert run_stage("download", made.config, made.workspace) == (first, False), "who does not ask is not told"
    second, built = run_stage("download", made.config, made.workspace, refresh=True, progress=tell)
    assert built
    assert second.hash != first.hash
    assert any(f"{site.url}/corpus.jsonl changed: " in text for text in told)
    assert b"Passage 0" in (tmp_path / "data/corpus.jsonl").read_bytes()


def test_a_source_without_versions_is_fetched_again_by_a_refresh(site: Site, tmp_path: Path) -> None:
    site.etags = False
    made = context(tmp_path, site)
    first, _ = run_stage("download", made.config, made.workspace)
    again, built = run_stage("download", made.config, made.workspace, refresh=True)
    assert built
    assert again.hash == first.hash, "equal files make an equal artifact, and what was built from it stays current"


def test_a_refresh_of_a_source_that_does_not_answer_is_an_error_and_keeps_the_data(site: Site, tmp_path: Path) -> None:
    made = context(tmp_path, site, transfer={"attempts": 1})
    first, _ = run_stage("download", made.config, made.workspace)
    del site.files["corpus.jsonl"]
    with pytest.raises(DataError, match="404"):
        run_stage("download", made.config, made.workspace, refresh=True)
    assert manifest.load(tmp_path / "data").hash == first.hash


def test_what_a_refresh_brings_is_measured_for_drift(site: Site, tmp_path: Path) -> None:
    data = defects.snapshot()
    files = {f"s/{name}.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode() for name, rows in data.items()}
    site.files.clear()
    site.files.update(files)
    named = {split: [f"s/{split}.jsonl"] for split in ("train", "dev", "test")}
    made = context(tmp_path, site, corpus="s/corpus.jsonl", **named)
    for stage in ("download", "validate"):
        run_stage(stage, made.config, made.workspace, refresh=True)
    site.files["s/corpus.jsonl"] = b"".join(files["s/corpus.jsonl"].splitlines(keepends=True)[:60])
    run_stage("download", made.config, made.workspace, refresh=True)
    with pytest.raises(QualityError, match=r"drift: .*rows"):
        run_stage("validate", made.config, made.workspace, refresh=True)
