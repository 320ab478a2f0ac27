# For a machine with CUDA GPUs and NVIDIA's container toolkit. Not tested: it has never been built (docs/launching.md#in-a-container).
#   docker build -t mixmodal .
#   docker run --gpus all --ipc host -v "$PWD:/work" mixmodal mixmodal --help
# Only what pip and DeepSpeed need to compile is taken from the image: the CUDA libraries come with torch.
# CUDA must have the major version of torch's, which `python -c "import torch; print(torch.version.cuda)"` tells; DeepSpeed compares
# them when it compiles what offloading needs.
ARG CUDA=12.8.1
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends build-essential git ninja-build pdsh openssh-client \
      python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH PYTHONUTF8=1
RUN python3 -m venv /opt/venv
COPY pyproject.toml constraints.txt README.md LICENSE /opt/mixmodal/
COPY mixmodal /opt/mixmodal/mixmodal
COPY tokenizers /opt/mixmodal/tokenizers
COPY train /opt/mixmodal/train
COPY sample /opt/mixmodal/sample
COPY configs /opt/mixmodal/configs
RUN pip install --no-cache-dir -c /opt/mixmodal/constraints.txt -e "/opt/mixmodal[train,retrieval,diffusion,finetune,qlora,serve,eval]"
WORKDIR /work
