# Flows, tasks, evaluation client and servers of the pipeline: one image for Prefect's server and worker and for MLflow.
# Build from the checkout: docker build -f infra/docker/pipeline.Dockerfile -t research-rl/pipeline:local .
FROM python:3.11.14-slim-bookworm

# git: DVC asks it for the checkout's state.
RUN apt-get update \
  && apt-get install --yes --no-install-recommends git=1:2.39.* \
  && rm -rf /var/lib/apt/lists/* \
  && useradd --create-home --uid 10001 research
WORKDIR /app
COPY requirements/ requirements/
COPY research_rl/__init__.py research_rl/__init__.py
COPY pyproject.toml README.md LICENSE ./
RUN python requirements/install.py pipeline
COPY --chown=10001 . .

ENV PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONPATH=/app RESEARCH_CHECKOUT=/app DO_NOT_TRACK=1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false PREFECT_HOME=/home/research/.prefect RESEARCH_CACHE=/home/research/.cache
USER 10001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=20s --start-period=2m --retries=3 CMD ["research", "--version"]
CMD ["prefect", "worker", "start", "--pool", "laptop", "--type", "process"]
