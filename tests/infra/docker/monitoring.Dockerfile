# Debian's Prometheus and Alertmanager with what compose.yaml uses of their images: an entrypoint, a folder that `nobody` owns, wget.
FROM python:3.11.14-slim-bookworm AS prometheus
RUN --mount=type=secret,id=apt,target=/etc/apt/sources.list.d/debian.sources \
    apt-get update \
  && apt-get install --yes --no-install-recommends prometheus=2.42.* wget=1.21.* \
  && rm -rf /var/lib/apt/lists/* \
  && install --directory --owner 65534 --group 65534 /prometheus
USER 65534
ENTRYPOINT ["/usr/bin/prometheus"]

FROM python:3.11.14-slim-bookworm AS alertmanager
RUN --mount=type=secret,id=apt,target=/etc/apt/sources.list.d/debian.sources \
    apt-get update \
  && apt-get install --yes --no-install-recommends prometheus-alertmanager=0.25.* wget=1.21.* \
  && rm -rf /var/lib/apt/lists/* \
  && install --directory --owner 65534 --group 65534 /alertmanager
USER 65534
ENTRYPOINT ["/usr/bin/prometheus-alertmanager"]
