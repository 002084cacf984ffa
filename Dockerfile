# An image for GPUs, with the repository in /opt/jepa_scale, as scripts/k8s/jobset.yaml expects it.
#
#   docker build --tag jepa-scale .
#   docker run --gpus all --ipc host --volume "$PWD/runs:/opt/jepa_scale/runs" jepa-scale \
#     scripts/launch_torchrun.sh --config configs/tiny_corpus.yaml
#
# BASE must have nvcc of the CUDA that torch's wheel is made for (python -c "import torch; print(torch.version.cuda)"), or
# flash-attn does not build; without it PyTorch's varlen attention serves. MAX_JOBS: its compilers, each of which takes gigabytes.
ARG BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04
FROM ${BASE}

ARG MAX_JOBS=8
ENV DEBIAN_FRONTEND=noninteractive PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 MAX_JOBS=${MAX_JOBS}
RUN apt-get update \
  && apt-get install --yes --no-install-recommends \
    build-essential git openssh-client pdsh python3 python3-dev python3-venv \
  && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 10001 trainer && install --directory --owner trainer /opt/jepa_scale
USER trainer
WORKDIR /opt/jepa_scale

# first what changes rarely: the packages
RUN python3 -m venv .venv
ENV PATH=/opt/jepa_scale/.venv/bin:${PATH}
COPY --chown=trainer constraints.txt ./
RUN pip install --constraint constraints.txt torch setuptools wheel packaging
COPY --chown=trainer pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY --chown=trainer jepa_scale jepa_scale
COPY --chown=trainer configs configs
COPY --chown=trainer scripts scripts
RUN DS_BUILD_OPS=0 pip install --constraint constraints.txt --no-build-isolation --editable . \
  && (pip install --constraint constraints.txt --no-build-isolation --editable ".[gpu]" \
      || echo "flash-attn did not build; PyTorch's varlen attention serves instead")

CMD ["jepa-scale", "--help"]
