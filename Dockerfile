# docker build --tag weightops . && docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/work" weightops inspect ./model
FROM python:3.11-slim AS build
# torch without CUDA, which the default for Linux brings along.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m venv /opt/weightops
ENV PATH=/opt/weightops/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt ./
RUN pip install --constraint constraints.txt --extra-index-url "$TORCH_INDEX" torch
COPY LICENSE README.md pyproject.toml ./
COPY kernels kernels
COPY manifests manifests
COPY weightops weightops
RUN pip install --constraint constraints.txt --extra-index-url "$TORCH_INDEX" ".[b3]"

FROM python:3.11-slim
COPY --from=build /opt/weightops /opt/weightops
RUN useradd --create-home weightops
USER weightops
# Any user that `docker run --user` names may write here.
ENV PATH=/opt/weightops/bin:$PATH XDG_CACHE_HOME=/tmp/cache
WORKDIR /work
ENTRYPOINT ["weightops"]
CMD ["--help"]
