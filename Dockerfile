# docker build -t megabyte-distill .                          another image: --build-arg IMAGE=nvcr.io/nvidia/pytorch:26.10-py3
# docker run --rm -it --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 megabyte-distill
# docs/containers.md says the rest.
ARG IMAGE=nvcr.io/nvidia/pytorch:26.09-py3
FROM ${IMAGE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# The image pins everything; its torch, Transformer Engine and apex must stay, the rest may follow our needs.
ENV PIP_CONSTRAINT="" PIP_NO_CACHE_DIR=1
WORKDIR /opt/megabyte-distill

RUN python -c "import torch; print(torch.__version__)" > /opt/torch_before \
    && python -m pip list --format=freeze | grep -iE '^(torch|triton|transformer|apex|flash|nvidia|numpy)' \
    | grep -v '@' > /opt/constraints.txt

# Without its dependencies, which would replace what the image has. Ours but torch are named; tests hold the list complete.
RUN python -m pip install --no-deps "megatron-core>=0.16.1,<0.20" \
    && python -m pip install -c /opt/constraints.txt \
        "setuptools>=77" numpy sentencepiece "tiktoken>=0.9" tokenizers orjson zstandard pyarrow safetensors psutil tqdm \
        tensorboard matplotlib

COPY . .
RUN python -m pip install --no-deps --no-build-isolation -e . \
    && python -m megabyte_distill.kernels build

# A build that changed torch, or cannot import or load what a run needs, fails here and not on the cluster. Transformer
# Engine may want the driver's library, which a build does not have: what is usable is printed.
RUN python -c "import torch; print(torch.__version__)" | diff /opt/torch_before - \
    && python -c "import megatron.core, megabyte_distill; print(megabyte_distill.__version__)" \
    && python -c "from megabyte_distill import optional; print(optional.describe())" \
    && python -c "from megabyte_distill.kernels.library import load; print(load('cuda').targets)"
