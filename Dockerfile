# The same two commands in a container.
#
#   docker build -t xpnn . && docker run --rm xpnn                    runs `make bench`
#   docker run --rm xpnn make test
#
# On a CUDA base, with a GPU visible:
#
#   docker build --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 -t xpnn:cuda .
#   docker run --rm --gpus all xpnn:cuda

ARG BASE=python:3.12-slim
FROM ${BASE}

# the CUDA images bring no Python; the Python image has its own, outside the distribution's packages
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make g++ \
    && if ! command -v python3; then apt-get install --yes --no-install-recommends python3 python3-venv; fi \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home xpnn && install --directory --owner=xpnn /xpnn
USER xpnn
WORKDIR /xpnn
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

COPY --chown=xpnn . .
RUN make env
CMD ["make", "bench"]
