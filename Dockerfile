# docker build -t chatglm-lora --build-arg UID=$(id -u) --build-arg GID=$(id -g) .
# mkdir -p output ~/.cache/huggingface
# docker run --rm -it --gpus all --shm-size 8g -v "$PWD/data:/workspace/data" -v "$PWD/output:/workspace/output" \
#     -v ~/.cache/huggingface:/home/trainer/.cache/huggingface chatglm-lora bash
#
# In it, the commands of README.md, with rows in data/ and adapters in output/: tokenise, and then for instance
#
# torchrun --nproc_per_node=2 multi_gpu_fintune_belle.py --model_name_or_path THUDM/chatglm3-6b \
#     --dataset_path data/mine --bf16 --output_dir output/mine
#
# For machines with NVIDIA GPUs, a driver of 580 or newer and the NVIDIA Container Toolkit. UID and GID are those of the
# user who may write to the mounted directories. Also possible: --build-arg PIP_INDEX_URL=https://... for a mirror of PyPI,
# and `docker run -e HF_ENDPOINT=https://...` for a mirror of the hub. Not built where it was written, which has no
# Docker: its steps were run one by one, on Debian and without a GPU (docs/tested.md).
#
# CUDA is the version that the wheel of torch on PyPI is built for: DeepSpeed compiles its extensions with that nvcc.
ARG CUDA=13.0.2
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04

# g++ and Python's headers: DeepSpeed's extensions and Triton's launchers are compiled at their first use.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# The user `ubuntu` of the base image has the UID that most users have.
ARG UID=1000
ARG GID=1000
RUN if id ubuntu > /dev/null 2>&1; then userdel --remove ubuntu; fi \
    && groupadd --non-unique --gid ${GID} trainer \
    && useradd --non-unique --uid ${UID} --gid ${GID} --create-home --shell /bin/bash trainer \
    && install -d -o ${UID} -g ${GID} /workspace /opt/venv

USER trainer
WORKDIR /workspace
ENV PATH=/opt/venv/bin:${PATH} CUDA_HOME=/usr/local/cuda
# Mount points, so that Docker does not create them as root.
RUN mkdir -p ~/.cache/huggingface output

ARG PIP_INDEX_URL
COPY --chown=trainer:trainer requirements.txt requirements.txt
COPY --chown=trainer:trainer tools/requirements.txt tools/requirements.txt
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir -r requirements.txt -r tools/requirements.txt

COPY --chown=trainer:trainer . .
CMD ["python", "tools/doctor.py"]
