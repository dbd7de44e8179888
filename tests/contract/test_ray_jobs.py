"""The trainer as a job of a real Ray cluster: followed, logged, stopped, and ended when its driver is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
from ray_cluster import BIN, Cluster, cluster

from research_rl.config import load_profile
from research_rl.errors import ConfigError, ServiceError
from research_rl.paths import CHECKOUT
from research_rl.training.run.launch import RayJobLauncher, RayJobs, launcher
from tests.waiting import until

pytestmark = pytest.mark.skipif(not BIN.is_dir(), reason="needs the policy environment; run `make setup`")
PYTHON = str(BIN / "python")
SLEEP = [PYTHON, "-c", "import time; print('started', flush=True); time.sleep(600)"]
DRIVER = """
import sys, time
from pathlib import Path
from research_rl.training.run.launch import RayJobLauncher, RayJobs
folder, address, token, python = Path(sys.argv[1]), *sys.argv[2:]
job = RayJobLauncher(RayJobs(address, token), folder, 3.0).start(
    [python, "-c", "import time; print('started', flush=True); time.sleep(600)"], {}, folder, folder / "attempt_1.log")
print(job.name, flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def ray() -> Generator[Cluster]:
    with cluster(1) as found:
        yield found


def start(ray: Cluster, folder: Path) -> RayJobLauncher:
    return RayJobLauncher(RayJobs(ray.address, ray.token), folder, 5.0)


def test_a_job_runs_where_and_with_what_it_is_told(ray: Cluster, tmp_path: Path) -> None:
    code = "import os; print(os.getcwd(), os.environ['TOLD'], flush=True); raise SystemExit(7)"
    made = start(ray, tmp_path)
    job = made.start([PYTHON, "-c", code], {"TOLD": "it's here"}, tmp_path, tmp_path / "attempt_1.log")
    assert (tmp_path / "train.job").is_file()
    assert until(lambda: job.poll() is not None), job.tail()
    assert (job.poll(), job.tail()) == (7, f"{tmp_path} it's here")
    assert job.stop() == 7
    assert not (tmp_path / "train.job").exists() and not list(tmp_path.glob("*.lease"))
    with pytest.raises(ServiceError, match="404"):
        made.jobs.info(job.name)  # type: ignore[attr-defined]


def test_a_stopped_job_leaves_nothing(ray: Cluster, tmp_path: Path) -> None:
    job = start(ray, tmp_path).start(SLEEP, {}, tmp_path, tmp_path / "attempt_1.log")
    assert until(lambda: "started" in job.tail())
    assert job.stop() == 143
    assert until(lambda: not [words for words in ray.busy() if str(tmp_path) in words]), ray.busy()


def test_a_job_ends_itself_when_its_driver_is_killed(ray: Cluster, tmp_path: Path) -> None:
    arguments = [str(tmp_path), ray.address, ray.token, PYTHON]
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, *arguments], env=env, stdout=subprocess.PIPE, text=True)
    assert driver.stdout
    name, log = driver.stdout.readline().strip(), tmp_path / "attempt_1.log"
    assert until(lambda: log.is_file() and "started" in log.read_text())
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert until(lambda: RayJobs(ray.address, ray.token).info(name)["status"] == "FAILED")
    assert "no sign of life" in log.read_text()
    assert not [words for words in ray.busy() if str(tmp_path) in words]


def test_the_job_of_an_earlier_process_is_reaped(ray: Cluster, tmp_path: Path) -> None:
    job = start(ray, tmp_path).start(SLEEP, {}, tmp_path, tmp_path / "attempt_1.log")
    assert until(lambda: "started" in job.tail())
    start(ray, tmp_path).reap()
    assert not (tmp_path / "train.job").exists()
    assert until(lambda: not [words for words in ray.busy() if str(tmp_path) in words])
    job.stop()


def test_a_wrong_token_and_a_silent_dashboard_are_named(ray: Cluster, tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match=r"refuses the token \(40[13]\); set RAY_AUTH_TOKEN"):
        RayJobs(ray.address, "0" * 64).info("none")
    silent = RayJobLauncher(RayJobs("http://127.0.0.1:9", "x"), tmp_path, 5.0)
    with pytest.raises(ServiceError, match=r"cluster\.address=http://127\.0\.0\.1:9 does not answer"):
        silent.start(SLEEP, {}, tmp_path, tmp_path / "attempt_1.log")
    assert not (tmp_path / "train.job").exists()


def test_a_retriever_on_loopback_is_refused_for_a_cluster_elsewhere(tmp_path: Path) -> None:
    config = load_profile("paper-7b", ["cluster.address=http://head.example:8265"])
    with pytest.raises(ConfigError, match=r"head\.example:8265 cannot reach the retriever at http://127\.0\.0\.1:5; set retriever\.host"):
        launcher(config, tmp_path, "http://127.0.0.1:5")
    assert isinstance(launcher(config, tmp_path, "http://retriever:5"), RayJobLauncher)
