# The retriever service. Build from the checkout: docker build -f infra/docker/retriever.Dockerfile -t research-rl/retriever:local .
# LOCK=retriever serves indexes of words (BM25) and of the lexical encoder; LOCK=retriever-torch also sentence encoders and exact search.
# The index is mounted at /workspace (artifacts/corpus, artifacts/embeddings, artifacts/index); nothing is written there.
# Behind a package index of your own: --secret id=pip,src=/etc/pip.conf --secret id=certificates,src=FILE.pem; neither stays in the image.
FROM python:3.11.14-slim-bookworm

RUN useradd --create-home --uid 10001 research
WORKDIR /app
COPY requirements/ requirements/
ARG LOCK=retriever
# Compiled here: who runs it cannot write there, and would compile every module anew at each start.
ENV UV_COMPILE_BYTECODE=1
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=certificates,target=/etc/ssl/certs/ca-certificates.crt \
    python requirements/install.py ${LOCK} \
  && rm -rf /root/.cache
COPY research_rl/ research_rl/
RUN python -m compileall -q research_rl

ARG VERSION=local
ARG COMMIT=unknown
LABEL org.opencontainers.image.title=research-rl-retriever org.opencontainers.image.version=${VERSION} org.opencontainers.image.revision=${COMMIT}
ENV PATH=/app/.venv-retriever/bin:$PATH PYTHONUNBUFFERED=1 PYTHONPATH=/app OMP_WAIT_POLICY=PASSIVE RESEARCH_CACHE=/tmp/research
USER 10001
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/readyz', timeout=4)"]
# RESEARCH_RETRIEVER_TOKEN must be set: without it a service refuses to listen on more than loopback.
ENTRYPOINT ["python", "-m", "research_rl.retriever.command", "--workspace", "/workspace", "--host", "0.0.0.0", "--port", "8080"]
