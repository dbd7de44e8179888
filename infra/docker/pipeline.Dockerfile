# Two images of one checkout. `pipeline`: Prefect's server, MLflow's and the bootstrap of infra/compose.yaml.
# `worker`: that and the policy environment; it runs flows, trains on the CPU and serves the agent.
#   docker build -f infra/docker/pipeline.Dockerfile --target pipeline -t research-rl/pipeline:local .
#   docker build -f infra/docker/pipeline.Dockerfile --target worker -t research-rl/worker:local .
# Behind mirrors of your own: --secret id=pip,src=/etc/pip.conf --secret id=apt,src=debian.sources --secret id=certificates,src=FILE.pem;
# none of them stays in the image.
FROM python:3.11.14-slim-bookworm AS environment

# git: DVC asks it for the checkout's state. The folders are made here: a named volume takes its owner from the image's folder.
RUN --mount=type=secret,id=apt,target=/etc/apt/sources.list.d/debian.sources \
    apt-get update \
  && apt-get install --yes --no-install-recommends git=1:2.39.* \
  && rm -rf /var/lib/apt/lists/* \
  && useradd --create-home --uid 10001 research \
  && install --directory --owner 10001 --group 10001 /home/research/.prefect /home/research/.cache /home/research/ui /workspace
WORKDIR /app
COPY requirements/ requirements/
COPY research_rl/__init__.py research_rl/__init__.py
COPY pyproject.toml LICENSE ./
# Compiled here: who runs it cannot write there, and would compile thousands of modules anew at each start.
ENV UV_COMPILE_BYTECODE=1
# The package's description comes with the code: a change of it builds no environment again.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=certificates,target=/etc/ssl/certs/ca-certificates.crt \
    touch README.md \
  && python requirements/install.py pipeline \
  && rm -rf /root/.cache

# Prefect copies its pages to a folder of its package, which this user cannot write, unless both names of the setting say otherwise.
ENV PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONPATH=/app RESEARCH_CHECKOUT=/app DO_NOT_TRACK=1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false PREFECT_HOME=/home/research/.prefect RESEARCH_CACHE=/home/research/.cache \
    PREFECT_UI_STATIC_DIRECTORY=/home/research/ui PREFECT_SERVER_UI_STATIC_DIRECTORY=/home/research/ui
STOPSIGNAL SIGTERM

# Before the code, so that a change of code builds no environment again.
FROM environment AS policy-environment
RUN --mount=type=secret,id=apt,target=/etc/apt/sources.list.d/debian.sources \
    --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=certificates,target=/etc/ssl/certs/ca-certificates.crt \
    apt-get update \
  && apt-get install --yes --no-install-recommends libnuma1=2.0.* \
  && rm -rf /var/lib/apt/lists/* \
  && python requirements/install.py policy \
  && rm -rf /root/.cache

FROM policy-environment AS worker
ARG VERSION=local
ARG COMMIT=unknown
LABEL org.opencontainers.image.title=research-rl-worker org.opencontainers.image.version=${VERSION} org.opencontainers.image.revision=${COMMIT}
COPY . .
RUN python -m compileall -q flows research_rl tasks
USER 10001
# The worker's own server answers once its last question to Prefect was answered.
HEALTHCHECK --interval=30s --timeout=10s --start-period=3m --retries=4 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=8)"]
CMD ["prefect", "worker", "start", "--pool", "laptop", "--type", "process", "--with-healthcheck"]

FROM environment AS pipeline
ARG VERSION=local
ARG COMMIT=unknown
LABEL org.opencontainers.image.title=research-rl-pipeline org.opencontainers.image.version=${VERSION} org.opencontainers.image.revision=${COMMIT}
COPY . .
RUN python -m compileall -q flows research_rl tasks
USER 10001
HEALTHCHECK --interval=10s --timeout=8s --start-period=3m --retries=6 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:4200/api/health', timeout=6)"]
CMD ["prefect", "server", "start", "--host", "0.0.0.0", "--port", "4200"]
