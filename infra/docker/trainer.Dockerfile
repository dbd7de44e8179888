# verl 0.9.1 with vLLM (ENGINE=vllm) or SGLang (ENGINE=sglang) rollouts, and Ray: head and workers of infra/k8s/overlays/gpu/rayjob.yaml.
# Build from the checkout: docker build -f infra/docker/trainer.Dockerfile --build-arg FLASH_ATTN_WHEEL=<url> -t research-rl/trainer:local .
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3.12 python3.12-dev python3.12-venv gcc g++ libnuma1 wget \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/policy PATH=/opt/policy/bin:/usr/local/cuda/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
RUN python3.12 -m venv /opt/policy

ARG ENGINE=vllm
COPY requirements/gpu-train-${ENGINE}.txt /tmp/lock.txt
# The lock is complete, and verl's SGLang pins contradict each other by metadata: nothing is resolved here.
RUN pip install --no-cache-dir --no-deps -r /tmp/lock.txt

# flash-attn is published as source; verl's authors publish a built wheel for torch 2.11 and CUDA 13. Without one it is compiled (an hour).
ARG FLASH_ATTN_WHEEL=
# The wheel's address carries its version.
# hadolint ignore=DL3013
RUN if [ -n "${FLASH_ATTN_WHEEL}" ]; then pip install --no-cache-dir --no-deps "${FLASH_ATTN_WHEEL}"; \
    else pip install --no-cache-dir --no-deps --no-build-isolation flash-attn==2.8.3; fi

WORKDIR /app
COPY pyproject.toml README.md ./
COPY configs ./configs
COPY research_rl ./research_rl
RUN useradd --create-home --uid 10001 research && mkdir /workspace && chown research /workspace
ENV PYTHONPATH=/app PYTHONUNBUFFERED=1 DO_NOT_TRACK=1 RAY_USAGE_STATS_ENABLED=0
USER 10001
VOLUME /workspace
ENTRYPOINT []
CMD ["python", "-m", "research_rl", "plan", "-w", "/workspace"]
