#!/bin/sh
# Make the database at the first start, then serve it. A database that was not made to its end is made anew.
set -eu
if [ ! -e "$PGDATA/made" ]; then
  find "$PGDATA" -mindepth 1 -delete
  printf '%s' "$POSTGRES_PASSWORD" >/tmp/password
  initdb --encoding UTF8 --locale C.UTF-8 --username "$POSTGRES_USER" --pwfile /tmp/password --auth-local trust --auth-host scram-sha-256 >/dev/null
  rm /tmp/password
  echo "host all all all scram-sha-256" >>"$PGDATA/pg_hba.conf"
  pg_ctl start --wait --options "-c listen_addresses=" >/dev/null
  createdb --username "$POSTGRES_USER" "$POSTGRES_DB"
  for script in /docker-entrypoint-initdb.d/*.sql; do psql --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" --set ON_ERROR_STOP=1 --file "$script"; done
  pg_ctl stop --wait --mode fast >/dev/null
  touch "$PGDATA/made"
fi
exec postgres -c "listen_addresses=*"
