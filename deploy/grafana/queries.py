"""What the panels ask the catalog, in PostgreSQL's SQL with Grafana's macros."""

from __future__ import annotations

__all__ = [
    "ARTIFACTS",
    "ATTEMPTS",
    "ATTEMPTS_OVER_TIME",
    "BATCHES",
    "CLOSEST",
    "FAILURES",
    "NEWEST_FAILURES",
    "RUNS",
    "RUN_ENDS",
    "RUN_FAILURES",
    "RUN_MODELS",
    "RUN_STEPS",
    "STANDING",
    "STEPS",
    "TASKS",
    "TEMPLATES",
]

# Hours over two weeks, days over more: the catalog counts both. The task is '*' for all of them.
_COUNTED = """\
span = CASE WHEN $__timeTo()::timestamptz - $__timeFrom()::timestamptz > interval '14 days' THEN 'day' ELSE 'hour' END
  AND dimension = CASE ${task:sqlstring} WHEN '*' THEN 'all' ELSE 'task' END
  AND word = CASE ${task:sqlstring} WHEN '*' THEN '' ELSE ${task:sqlstring} END
  AND $__timeFilter(start)"""

TASKS = """\
SELECT DISTINCT word FROM grouped_totals
WHERE span = 'day' AND dimension = 'task' AND word <> '' AND start > now() - interval '90 days' ORDER BY word"""

ATTEMPTS = f"""\
SELECT
  coalesce(sum(conversions) FILTER (WHERE status = 'converted'), 0) AS converted,
  coalesce(sum(conversions) FILTER (WHERE status = 'reused'), 0) AS reused,
  coalesce(sum(conversions) FILTER (WHERE status = 'mismatch'), 0) AS mismatch,
  coalesce(sum(conversions) FILTER (WHERE status = 'failed'), 0) AS failed
FROM grouped_totals
WHERE {_COUNTED}"""

ATTEMPTS_OVER_TIME = f"""\
SELECT start AS "time", status AS metric, sum(conversions) AS value
FROM grouped_totals
WHERE {_COUNTED}
GROUP BY start, status
ORDER BY start"""

FAILURES = f"""\
SELECT error_kind AS kind, sum(conversions) AS attempts
FROM grouped_totals
WHERE {_COUNTED}
  AND error_kind <> ''
GROUP BY error_kind
ORDER BY attempts DESC, kind"""

TEMPLATES = f"""\
SELECT template, sum(conversions) AS attempts
FROM grouped_totals
WHERE {_COUNTED}
  AND template <> ''
GROUP BY template
ORDER BY template"""

STANDING = "SELECT status, count(*) AS models FROM conversions WHERE latest GROUP BY status ORDER BY status"

ARTIFACTS = """\
SELECT
  coalesce(sum(size_bytes) FILTER (WHERE NOT quarantined), 0) AS served,
  coalesce(sum(size_bytes) FILTER (WHERE quarantined), 0) AS "in quarantine"
FROM artifacts"""

# A median over all attempts of a year would read them all.
_NEWEST = """\
WITH newest AS MATERIALIZED (
  SELECT id, source_model_id, peak_rss_bytes FROM conversions
  WHERE $__timeFilter(finished_at)
  ORDER BY finished_at DESC
  LIMIT 1000
)
"""

STEPS = f"""\
{_NEWEST}SELECT
  step,
  percentile_cont(0.5) WITHIN GROUP (ORDER BY seconds) AS median,
  percentile_cont(0.95) WITHIN GROUP (ORDER BY seconds) AS "95th",
  count(*) AS attempts
FROM newest
JOIN step_timings ON conversion_id = newest.id
GROUP BY step
ORDER BY array_position(ARRAY['fetch', 'detect', 'export', 'simplify', 'parity', 'register'], step::text)"""

CLOSEST = f"""\
{_NEWEST}SELECT
  model_id AS model, device, provider, verdict, max_abs_diff AS difference, tolerance AS allowed,
  max_abs_diff / tolerance AS share
FROM newest
JOIN parity_checks ON conversion_id = newest.id
JOIN source_models ON source_models.id = source_model_id
WHERE max_abs_diff IS NOT NULL AND tolerance > 0
ORDER BY share DESC
LIMIT 20"""

NEWEST_FAILURES = """\
SELECT finished_at AS "time", model_id AS model, task, status, error_kind AS kind, error_step AS step,
  left(error_message, 300) AS message, conversions.id AS conversion
FROM conversions
JOIN source_models ON source_models.id = source_model_id
WHERE latest AND status IN ('failed', 'mismatch') AND $__timeFilter(finished_at)
ORDER BY finished_at DESC
LIMIT 50"""

BATCHES = """\
SELECT id AS run, started_at AS "time", extract(epoch FROM finished_at - started_at) AS took, engine, models,
  converted, reused, mismatch, failed, finished_at IS NULL AS "no end yet"
FROM batches
WHERE $__timeFilter(started_at)
ORDER BY started_at DESC
LIMIT 50"""

RUNS = "SELECT id FROM batches ORDER BY started_at DESC LIMIT 100"

RUN_MODELS = """\
SELECT
  count(*) AS recorded,
  (SELECT models FROM batches WHERE id = ${run:sqlstring}::bigint) AS "of",
  count(*) FILTER (WHERE status = 'converted') AS converted,
  count(*) FILTER (WHERE status = 'mismatch') AS mismatch,
  count(*) FILTER (WHERE status = 'failed') AS failed
FROM conversions
WHERE batch_id = ${run:sqlstring}::bigint"""

RUN_ENDS = """\
SELECT date_trunc('minute', finished_at) AS "time", status AS metric, count(*) AS value
FROM conversions
WHERE batch_id = ${run:sqlstring}::bigint AND $__timeFilter(finished_at)
GROUP BY 1, 2
ORDER BY 1"""

RUN_STEPS = """\
SELECT step, sum(seconds) AS seconds
FROM conversions
JOIN step_timings ON conversion_id = conversions.id
WHERE batch_id = ${run:sqlstring}::bigint
GROUP BY step
ORDER BY array_position(ARRAY['fetch', 'detect', 'export', 'simplify', 'parity', 'register'], step::text)"""

RUN_FAILURES = """\
SELECT error_kind AS kind, count(*) AS models, min(model_id) AS "for example", left(min(error_message), 300) AS message
FROM conversions
JOIN source_models ON source_models.id = source_model_id
WHERE batch_id = ${run:sqlstring}::bigint AND error_kind IS NOT NULL
GROUP BY error_kind
ORDER BY models DESC, kind"""
