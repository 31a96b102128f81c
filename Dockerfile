# pecobook from PyPI, in an image of its own. PyTorch's wheels bring their CUDA libraries; a GPU needs only its driver, and
# Docker's --gpus. On a machine without a GPU, a tenth of the size:
#   docker build --build-arg TORCH_INDEX=ADDRESS -t pecobook .   # the index in pytorch.org's command for pip and CPU
# A run, with images and results on this machine; data-loading processes hand over their batches in shared memory:
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" pecobook codebook tiny --data images --out runs/codebook
FROM python:3.12-slim

ARG VERSION=0.1.0
ARG TORCH_INDEX=

RUN PIP_INDEX_URL="$TORCH_INDEX" pip install --no-cache-dir torch torchvision \
    && pip install --no-cache-dir "pecobook[full]==$VERSION"

# Files that pecobook writes belong to this user, or to the one that --user names.
RUN useradd --create-home --uid 1000 pecobook && mkdir /work && chown pecobook /work
USER pecobook
ENV MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /work
ENTRYPOINT ["pecobook"]
CMD ["--help"]
