// gRPC reflection for a server, made when the first client asks: reading all descriptors takes a fifth of a second, which
// no start should pay. Owns the standing-in only; the answers are those of @grpc/reflection.
import { existsSync, readFileSync } from "node:fs";
import type { handleBidiStreamingCall, Server, ServerDuplexStream, ServiceDefinition } from "@grpc/grpc-js";
import { loadFileDescriptorSetFromBuffer } from "@grpc/proto-loader";
import { ReflectionService } from "@grpc/reflection";

/** Written by `buf build`; without it there is no reflection. */
const DESCRIPTORS = new URL("../../proto/gen/image.binpb", import.meta.url);
const METHOD = "ServerReflectionInfo";
const SERVICES = ["grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"];

type Method = ServiceDefinition[string];
type Handler = handleBidiStreamingCall<unknown, unknown>;
type Real = { method: Method; handler: Handler };

/** What @grpc/reflection would have added to a server, by path. */
function realMethods(services: string[]): Map<string, Real> {
  const found = new Map<string, Real>();
  const descriptors = loadFileDescriptorSetFromBuffer(readFileSync(DESCRIPTORS));
  const catcher: Pick<Server, "addService"> = {
    addService: (definition, implementation) => {
      const method: Method | undefined = definition[METHOD];
      const handler: unknown = implementation[METHOD];
      if (!method || typeof handler !== "function") throw new Error(`@grpc/reflection has no ${METHOD} any more`);
      found.set(method.path, { method, handler: (call) => handler(call) });
    },
  };
  new ReflectionService(descriptors, { services }).addToServer(catcher);
  return found;
}

/** Lets clients list and describe these services; does nothing where the descriptors were not built. */
export function addReflection(server: Server, services: string[]): void {
  if (!existsSync(DESCRIPTORS)) return;
  let real: Map<string, Real> | undefined;
  for (const service of SERVICES) {
    const path = `/${service}/${METHOD}`;
    const at = (): Real => {
      real ??= realMethods(services);
      const method = real.get(path);
      if (!method) throw new Error(`@grpc/reflection does not serve ${path} any more`);
      return method;
    };
    server.addService(
      {
        [METHOD]: {
          path,
          requestStream: true,
          responseStream: true,
          requestSerialize: (value: unknown) => at().method.requestSerialize(value),
          requestDeserialize: (bytes: Buffer) => at().method.requestDeserialize(bytes),
          responseSerialize: (value: unknown) => at().method.responseSerialize(value),
          responseDeserialize: (bytes: Buffer) => at().method.responseDeserialize(bytes),
        },
      },
      { [METHOD]: (call: ServerDuplexStream<unknown, unknown>) => at().handler(call) },
    );
  }
}
