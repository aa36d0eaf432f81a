# The environment of `make setup`, for an ordinary user. Torch's default wheels bring CUDA; the host needs NVIDIA's driver:
#     docker build --tag lars-imagenet .
# A smaller one without CUDA takes torch from PyTorch's own index:
#     docker build --tag lars-imagenet:cpu --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu .
FROM python:3.11-slim-bookworm

# g++ brings the C compiler that lars/exact/kernels.c needs; DeepSpeed looks for numactl on CPUs. Debian's stable release
# keeps one version of each.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git make numactl \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 user \
    && install --directory --owner=user --group=user /home/user/lars-imagenet /home/user/lars-imagenet/runs
USER 1000
WORKDIR /home/user/lars-imagenet

# What `make setup` reads; a change of recipes, launch files or tests installs nothing anew.
COPY --chown=user:user Makefile README.md pyproject.toml requirements.txt ./
COPY --chown=user:user lars lars
ARG PIP_EXTRA_INDEX_URL=""
RUN PIP_NO_CACHE_DIR=1 make setup

COPY --chown=user:user . .
ENV PATH="/home/user/lars-imagenet/.venv/bin:$PATH"
CMD ["make", "help"]
