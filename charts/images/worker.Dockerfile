# Image of the workers: the same sources with the native engine. Built from the root of the checkout; base images come as
# arguments, by digest:
#
#   docker build -f charts/images/worker.Dockerfile -t muster/worker:0.1.0 \
#     --build-arg NODE_IMAGE=node@sha256:... \
#     --build-arg CUDA_DEVEL_IMAGE=nvidia/cuda@sha256:... --build-arg CUDA_RUNTIME_IMAGE=nvidia/cuda@sha256:... .
#
# NODE_IMAGE: npm, Node >= 20. The two CUDA images: one version and one distribution with apt, `devel` and `runtime`.
# A builder that does not find the ignore file beside this one by itself (buildah 1.28 does not) is told it: --ignorefile.
ARG NODE_IMAGE
ARG CUDA_DEVEL_IMAGE
ARG CUDA_RUNTIME_IMAGE

FROM ${NODE_IMAGE} AS packages
WORKDIR /muster
COPY package.json package-lock.json .npmrc ./
RUN npm ci --ignore-scripts --no-audit --no-fund
COPY buf.yaml buf.gen.yaml ./
COPY proto proto
RUN PATH="/muster/node_modules/.bin:$PATH" \
 && buf generate && buf build proto -o proto/gen/image.binpb

FROM packages AS pruned
RUN npm prune --omit=dev --ignore-scripts --no-audit --no-fund \
 && rm -r node_modules/node-linux-*/include

FROM ${CUDA_DEVEL_IMAGE} AS engine
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends cmake g++ ninja-build \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /muster
COPY --from=packages /muster/node_modules/node-addon-api node_modules/node-addon-api
COPY --from=packages /muster/node_modules/node-api-headers node_modules/node-api-headers
COPY native native
RUN cmake -S native -B native/build -G Ninja -DCMAKE_BUILD_TYPE=Release \
 && cmake --build native/build --target muster_addon

FROM ${CUDA_RUNTIME_IMAGE}
WORKDIR /muster
COPY --from=packages /muster/package.json ./
COPY --from=pruned /muster/node_modules node_modules
COPY --from=packages /muster/proto proto
COPY --from=engine /muster/native/build/muster.node native/build/muster.node
COPY controller controller
COPY worker worker
COPY test/models test/models
COPY --chmod=755 charts/images/muster /usr/local/bin/muster
# A name and a home that can be written: without, the commands for one machine (up, status, doctor) fail for this user.
RUN ln -s /muster/node_modules/node-linux-*/bin/node /usr/local/bin/node \
 && echo 'muster:x:65532:65532:muster:/tmp:/usr/sbin/nologin' >> /etc/passwd
USER 65532:65532
RUN muster --version && node -e 'require("/muster/native/build/muster.node")'
ENTRYPOINT ["muster"]
