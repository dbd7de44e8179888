# The retriever service. Build from the checkout: docker build -f infra/docker/retriever.Dockerfile -t research-rl/retriever:local .
# The index is mounted at /workspace (artifacts/corpus, artifacts/embeddings, artifacts/index); nothing is written there.
FROM python:3.11.14-slim-bookworm

RUN useradd --create-home --uid 10001 research
WORKDIR /app
COPY requirements/ requirements/
COPY research_rl/__init__.py research_rl/__init__.py
COPY pyproject.toml README.md LICENSE ./
RUN python requirements/install.py pipeline
COPY research_rl/ research_rl/

ENV PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE RESEARCH_CACHE=/tmp/research
USER 10001
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/readyz', timeout=4)"]
# RESEARCH_RETRIEVER_TOKEN must be set: without it a service refuses to listen on more than loopback.
ENTRYPOINT ["python", "-m", "research_rl.retriever.command", "--workspace", "/workspace", "--host", "0.0.0.0", "--port", "8080"]
