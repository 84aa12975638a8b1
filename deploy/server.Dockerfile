# syntax=docker/dockerfile:1
# The Prefect server, in an image of its own with its own pins: under other releases of FastAPI it does not start, and
# under SQLAlchemy 2.1 it looks healthy and schedules nothing. Build from the repository's root:
#   docker build -f deploy/server.Dockerfile -t onnx-ferry-prefect-server .
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm
COPY deploy/constraints-server.txt /tmp/constraints.txt
RUN pip install --no-cache-dir --disable-pip-version-check -c /tmp/constraints.txt prefect asyncpg \
    && useradd --create-home --uid 10001 prefect
ENV PYTHONUNBUFFERED=1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    DO_NOT_TRACK=1
USER 10001
EXPOSE 4200
CMD ["prefect", "server", "start", "--host", "0.0.0.0", "--port", "4200"]
