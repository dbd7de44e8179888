# SGLang 0.5.23: serves the trained policy on port 8000; what `serving.engine=sglang` starts on a GPU host.
# Build from the checkout: docker build -f infra/docker/server.Dockerfile -t research-rl/server:local .
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3.12 python3.12-dev python3.12-venv gcc g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/serve PATH=/opt/serve/bin:/usr/local/cuda/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
COPY requirements/gpu-serve.txt /tmp/lock.txt
RUN useradd --create-home --uid 10001 research \
    && python3.12 -m venv /opt/serve \
    && pip install --no-cache-dir --no-deps -r /tmp/lock.txt
USER 10001
VOLUME /model
EXPOSE 8000
ENV PYTHONUNBUFFERED=1 DO_NOT_TRACK=1
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["python", "-m", "sglang.launch_server", "--model-path", "/model", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--dtype", "bfloat16", "--context-length", "8704"]
