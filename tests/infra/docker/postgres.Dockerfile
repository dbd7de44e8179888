# Debian's Postgres with what compose.yaml uses of Postgres' image: POSTGRES_USER, _PASSWORD, _DB, scripts at the first start, user 999.
FROM python:3.11.14-slim-bookworm
RUN groupadd --gid 999 postgres && useradd --uid 999 --gid 999 --home-dir /var/lib/postgresql postgres
RUN --mount=type=secret,id=apt,target=/etc/apt/sources.list.d/debian.sources \
    apt-get update \
  && apt-get install --yes --no-install-recommends postgresql-15=15.* \
  && rm -rf /var/lib/apt/lists/* \
  && install --directory --mode 0700 --owner 999 --group 999 /var/lib/postgresql/data /var/run/postgresql
ENV PATH=/usr/lib/postgresql/15/bin:$PATH PGDATA=/var/lib/postgresql/data
COPY postgres.sh /usr/local/bin/postgres.sh
USER 999
STOPSIGNAL SIGINT
ENTRYPOINT ["sh", "/usr/local/bin/postgres.sh"]
