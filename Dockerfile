# CPU: docker build -t mamba-serve .      NVIDIA GPU: docker build -t mamba-serve:cuda --build-arg VARIANT=cuda .
# There is no HEALTHCHECK: /livez and /readyz are two questions, and orchestrators ask them (deploy/kubernetes.yaml).
ARG BASE=docker.io/library/python:3.12-slim-bookworm
ARG VARIANT=cpu

# dependencies change seldom: a layer of their own, the largest
FROM ${BASE} AS dependencies
ARG VARIANT
# an offline build mounts wheels and names them here; pip reads both from the environment
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
ENV PIP_CACHE_DIR=/var/cache/pip
WORKDIR /src
COPY pyproject.toml ./
COPY scripts/bootstrap.py scripts/
RUN --mount=type=cache,target=/var/cache/pip \
    python3 scripts/bootstrap.py --venv /opt/venv --torch "${VARIANT}" --dependencies-only

FROM dependencies AS project
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
COPY README.md LICENSE ./
COPY mamba_core mamba_core
COPY app app
RUN --mount=type=cache,target=/var/cache/pip \
    /opt/venv/bin/python -m pip install --no-deps --target /opt/app .

FROM ${BASE} AS runtime-cpu

FROM ${BASE} AS runtime-cuda
# Triton compiles a small launcher for each kernel when it is first used
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

FROM runtime-${VARIANT}
LABEL org.opencontainers.image.title="mamba-serve" \
      org.opencontainers.image.description="An HTTP server for Mamba language models" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 mamba \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin mamba \
    && install --directory --owner=10001 --group=10001 /cache
COPY --from=dependencies /opt/venv /opt/venv
COPY models/mamba-python-15m /app/models/mamba-python-15m
COPY --from=project /opt/app /opt/app
ENV PATH=/opt/app/bin:/opt/venv/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONPATH=/opt/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    NUMBA_CACHE_DIR=/cache/numba \
    MAMBA_MODEL=/app/models/mamba-python-15m
# with a read-only root, /tmp and this are all that is written to
VOLUME /cache
WORKDIR /app
USER 10001:10001
EXPOSE 8000
ENTRYPOINT ["mamba-serve", "--host", "0.0.0.0"]
