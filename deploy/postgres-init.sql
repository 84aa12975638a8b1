-- Prefect's server has a database of its own beside the catalog's.
CREATE DATABASE prefect OWNER ferry;
REVOKE CONNECT ON DATABASE prefect FROM PUBLIC;
-- Grafana reads the catalog and nothing else. Without a password in .env nobody can log in as it.
\getenv password GRAFANA_DATABASE_PASSWORD
CREATE ROLE grafana LOGIN PASSWORD :'password' IN ROLE pg_read_all_data;
ALTER ROLE grafana SET default_transaction_read_only = on;
ALTER ROLE grafana SET statement_timeout = '30s';
