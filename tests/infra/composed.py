"""infra/compose.yaml of a checkout, run by Compose with secrets that were drawn for it, and a client of its servers."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

from tasks.local import compose
from tests.infra.engine import Engine

SERVERS = ("postgres", "s3", "prefect", "mlflow", "bootstrap", "worker", "exporter")
PREFECT, MLFLOW = "http://127.0.0.1:4200", "http://127.0.0.1:5000"
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
ASK = """
import json, sys, urllib.error, urllib.request
url, body, key = sys.argv[1:]
headers = {"Content-Type": "application/json", **({"Authorization": key} if key else {})}
try:
    answer = urllib.request.urlopen(urllib.request.Request(url, body.encode() or None, headers), timeout=300)
    print(answer.status, answer.read().decode())
except urllib.error.HTTPError as error:
    print(error.code, "null")
except OSError:
    print(0, "null")
"""


class Composed:
    """The servers of compose.yaml on an engine that runs; the folder `workspace` is the users'."""

    def __init__(self, engine: Engine, checkout: Path, workspace: Path, *more: Path) -> None:
        self.engine, self.workspace, self.files = engine, workspace, (checkout / "infra/compose.yaml", *more)
        env = workspace.parent / f"{workspace.name}.env"
        compose.write_secrets(env, self.files[0])
        self.secrets = dict(line.split("=", 1) for line in env.read_text().splitlines())
        # A training of a few steps need not become the champion.
        self.env = {**self.secrets, "WORKSPACE": str(workspace), "COMPOSE_PROFILES": "serving", "AGENT_MODEL": "after"}

    def compose(self, *arguments: str) -> str:
        """Return what `docker compose` prints. Raises AssertionError with the end of its output."""
        files = [word for file in self.files for word in ("--file", str(file))]
        return self.engine.docker("compose", *files, *arguments, env=self.env)

    def up(self, *services: str) -> None:
        """Start services from images that stand, and what they depend on, and wait until all are healthy."""
        try:
            self.compose("up", "--no-build", "--pull", "never", "--detach", "--wait", *services)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from error

    def container(self, service: str) -> str:
        """Return the id of a service's container, also of one that ended."""
        return self.compose("ps", "--all", "--quiet", service).strip()

    def logs(self, *services: str) -> str:
        """Return the end of what the services printed."""
        return self.compose("logs", "--no-color", "--tail", "60", *services)

    def remove(self) -> None:
        """Take containers, networks and volumes away."""
        self.compose("down", "--volumes", "--timeout", "60")


class Client:
    """Asks the published ports, as a user of the machine does."""

    def __init__(self, composed: Composed) -> None:
        self.composed = composed
        users = {PREFECT: composed.secrets["PREFECT_KEY"], MLFLOW: f"research:{composed.secrets['MLFLOW_PASSWORD']}"}
        self.keys = {server: f"Basic {base64.b64encode(user.encode()).decode()}" for server, user in users.items()}

    def status(self, server: str, path: str, *, key: bool = False) -> int:
        """Return the HTTP status of a GET, 0 where nothing answers."""
        return int(self._ask(server, path, "", self.keys[server] if key else "").partition(" ")[0])

    def ask(self, server: str, path: str, body: Any = None, key: str = "") -> Any:
        """Return the answer to a GET, or to a POST of `body`."""
        text = "" if body is None else json.dumps(body)
        status, _, answer = self._ask(server, path, text, key or self.keys.get(server, "")).partition(" ")
        assert status in ("200", "201"), (path, status)
        return json.loads(answer)

    def _ask(self, server: str, path: str, body: str, key: str) -> str:
        return self.composed.engine.inside(sys.executable, "-c", ASK, server + path, body, key)

    def deployments(self) -> dict[str, str]:
        """Return the id of each deployment."""
        return {item["name"]: item["id"] for item in self.ask(PREFECT, "/api/deployments/filter", {"limit": 200})}

    def automations(self) -> list[str]:
        """Return the name of each automation, in order."""
        return sorted(item["name"] for item in self.ask(PREFECT, "/api/automations/filter", {}))

    def start(self, deployment: str, variables: dict[str, Any] | None = None, **parameters: Any) -> str:
        """Start a run of a deployment, with job variables for its container, and return its id."""
        body = {"parameters": parameters, "job_variables": variables or {}}
        return self.ask(PREFECT, f"/api/deployments/{self.deployments()[deployment]}/create_flow_run", body)["id"]

    def run(self, run: str) -> dict[str, Any]:
        """Return a flow run."""
        return self.ask(PREFECT, f"/api/flow_runs/{run}")

    def over(self, run: str) -> bool:
        """Return whether a flow run has ended."""
        return self.run(run)["state"]["type"] in ENDED

    def tracked(self, **named: str) -> list[dict[str, Any]]:
        """Return the runs of MLflow's experiment of the trainings that have these tags."""
        found = self.ask(MLFLOW, "/api/2.0/mlflow/experiments/get-by-name?experiment_name=research-rl")["experiment"]["experiment_id"]
        query = " and ".join(f"tags.`{name}` = '{value}'" for name, value in named.items())
        body = {"experiment_ids": [found], "filter": query, "max_results": 1000}
        return self.ask(MLFLOW, "/api/2.0/mlflow/runs/search", body).get("runs", [])

    def steps(self, run: str, metric: str) -> list[int]:
        """Return the steps of a metric of MLflow's run."""
        path = f"/api/2.0/mlflow/metrics/get-history?run_id={run}&metric_key={metric}&max_results=20000"
        return sorted({int(point["step"]) for point in self.ask(MLFLOW, path).get("metrics", [])})

    def artifacts(self, run: str, folder: str) -> list[str]:
        """Return the files of a folder among the artifacts of MLflow's run, which lie in the S3 store."""
        found = self.ask(MLFLOW, f"/api/2.0/mlflow/artifacts/list?run_id={run}&path={folder}").get("files", [])
        return sorted(item["path"] for item in found if not item["is_dir"])
