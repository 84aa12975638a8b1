-- Prefect's server has a database of its own beside the catalog's.
CREATE DATABASE prefect OWNER ferry;
