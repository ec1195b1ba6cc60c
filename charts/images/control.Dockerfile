# Image of the controller and the gateway. Built from the root of the checkout; base images come as arguments, by digest:
#
#   docker build -f charts/images/control.Dockerfile -t muster/control:0.1.0 \
#     --build-arg NODE_IMAGE=node@sha256:... --build-arg RUNTIME_IMAGE=debian@sha256:... .
#
# NODE_IMAGE: npm, Node >= 20. RUNTIME_IMAGE: glibc and libstdc++; the Node that runs is the lock file's.
# A builder that does not find the ignore file beside this one by itself (buildah 1.28 does not) is told it: --ignorefile.
ARG NODE_IMAGE
ARG RUNTIME_IMAGE

FROM ${NODE_IMAGE} AS packages
WORKDIR /muster
COPY package.json package-lock.json .npmrc ./
RUN npm ci --ignore-scripts --no-audit --no-fund
COPY buf.yaml buf.gen.yaml ./
COPY proto proto
RUN PATH="/muster/node_modules/.bin:$PATH" \
 && buf generate && buf build proto -o proto/gen/image.binpb \
 && npm prune --omit=dev --ignore-scripts --no-audit --no-fund \
 && rm -r node_modules/node-linux-*/include

FROM ${RUNTIME_IMAGE}
WORKDIR /muster
COPY --from=packages /muster/package.json ./
COPY --from=packages /muster/node_modules node_modules
COPY --from=packages /muster/proto proto
COPY controller controller
COPY worker worker
COPY test/models test/models
COPY --chmod=755 charts/images/muster /usr/local/bin/muster
# A name and a home that can be written: without, the commands for one machine (up, status, doctor) fail for this user.
RUN ln -s /muster/node_modules/node-linux-*/bin/node /usr/local/bin/node \
 && echo 'muster:x:65532:65532:muster:/tmp:/usr/sbin/nologin' >> /etc/passwd
USER 65532:65532
RUN muster --version
ENTRYPOINT ["muster"]
