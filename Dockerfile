# docker build -t megabyte-distill .
# docker run --rm -it --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 megabyte-distill
FROM nvcr.io/nvidia/pytorch:26.09-py3

# The image pins everything; its torch, Transformer Engine and apex must stay, the rest may follow our needs.
ENV PIP_CONSTRAINT="" PIP_NO_CACHE_DIR=1
WORKDIR /opt/megabyte-distill

RUN python -c "import torch; print(torch.__version__)" > /tmp/torch_before \
    && python -m pip list --format=freeze | grep -iE '^(torch|triton|transformer|apex|flash|nvidia|numpy)' \
    | grep -v '@' > /tmp/constraints.txt

# Without their dependencies, which would replace what the image has.
RUN python -m pip install --no-deps "megatron-core>=0.16.1,<0.20" \
    && python -m pip install -c /tmp/constraints.txt \
        sentencepiece tiktoken tokenizers safetensors psutil tqdm tensorboard matplotlib packaging

COPY . .
RUN python -m pip install --no-deps --no-build-isolation -e .

# A build that changed torch, or cannot import what a run needs, fails here and not on the cluster.
RUN python -c "import torch; print(torch.__version__)" | diff /tmp/torch_before - \
    && python -c "import transformer_engine.pytorch, megatron.core, megabyte_distill; print(megabyte_distill.__version__)"
