// What the flags of `muster controller` say about trust, opened: certificates, broker, what worker pods are told, and the parts
// that go with it. Without --tls all is in clear, for one machine and its tests.
import { isIP } from "node:net";
import { FaultError, invalid } from "../../proto/fault.ts";
import { noTrust, type Trust } from "../../proto/trust.ts";
import type { Broker } from "../api/mapping.ts";
import type { KubeApi } from "../kube/api/client.ts";
import { systemClock } from "../kube/api/clock.ts";
import type { WorkerTemplate } from "../kube/groups/pods.ts";
import { LEADER_SERVICE, type LeaderPort, leaderEndpointPart } from "../kube/lease/leader-endpoint.ts";
import type { Part } from "../kube/run-controller.ts";
import { BUNDLE } from "../kube/trust/bundles.ts";
import { openTrust } from "../kube/trust/open.ts";
import { NATS_USER } from "../kube/trust/secrets.ts";
import type { ReadDocument } from "../kube/trust/tokens.ts";

export type TrustFlags = { tls?: boolean; enrol?: string; listen?: string; advertise?: string; natsUrl?: string };

export type TrustWiring = {
  flags: TrustFlags;
  api: KubeApi;
  readDocument: ReadDocument;
  template: WorkerTemplate;
  /** Of the release. */
  namespace: string;
  /** Owners of this namespace alone; undefined: of all. */
  watched?: string | undefined;
  onNews: (detail: string) => void;
  onTrouble: (detail: string) => void;
};

export type Trusted = { trust: Trust; template: WorkerTemplate; broker: Broker | undefined; parts: readonly Part[] };

/** Throws FaultError where flags do not go together or what is stored cannot be used, KubeError as `openTrust` does. */
export async function openTrusted(wiring: TrustWiring, signal: AbortSignal): Promise<Trusted> {
  const { flags, api, readDocument, template, namespace, watched, onNews, onTrouble } = wiring;
  const { MUSTER_POD_IP: ip = "", MUSTER_POD_UID: uid = "", MUSTER_POD_NAME: name = "" } = process.env;
  if (ip !== "" && isIP(ip) === 0) throw new FaultError(invalid("MUSTER_POD_IP", `"${ip}" is no address`));
  const { MUSTER_NATS_TOKEN: givenToken = "" } = process.env;
  const brokerOf = (own: { user: string; token: string }): Broker | undefined =>
    flags.natsUrl === undefined
      ? undefined
      : { url: flags.natsUrl, ...(givenToken === "" ? own : { token: givenToken }) };
  const endpoint = endpointPart(flags, { namespace, ip, onTrouble });
  if (!flags.tls) return { trust: noTrust, template, broker: brokerOf({ user: "", token: "" }), parts: endpoint };
  const { enrol } = flags;
  const advertise = flags.advertise?.replace(/:\d+$/, "");
  if (enrol === undefined || advertise === undefined)
    throw new FaultError(invalid("--tls", "--enrol and --advertise are needed with it: pods get certificates there"));
  const service = `${LEADER_SERVICE}.${namespace}`;
  const names = [service, `${service}.svc`, `${service}.svc.cluster.local`];
  const { trust, natsToken, signer, part } = await openTrust(
    {
      api,
      readDocument,
      clock: systemClock,
      random: Math.random,
      namespace,
      pod: { name, uid, ip },
      dns: [...new Set([...names, ...(isIP(advertise) === 0 ? [advertise] : [])])],
      enrol,
      podCertificates: template.podCertificates === false ? undefined : { watched },
      onNews,
      onTrouble,
    },
    signal,
  );
  const told = {
    enrol: `${advertise}:${portOf("--enrol", enrol)}`,
    caConfigMap: template.caConfigMap ?? BUNDLE,
    signer,
  };
  return {
    trust,
    template: { ...template, ...told },
    broker: brokerOf({ user: NATS_USER, token: natsToken }),
    parts: [part, ...endpoint],
  };
}

/** Only a pod can be an endpoint of a Service. */
function endpointPart(
  { listen, enrol }: TrustFlags,
  { namespace, ip, onTrouble }: { namespace: string; ip: string; onTrouble: (detail: string) => void },
): Part[] {
  const ports: LeaderPort[] = [
    ...(listen === undefined ? [] : [{ name: "reports", port: portOf("--listen", listen) }]),
    ...(enrol === undefined ? [] : [{ name: "certificates", port: portOf("--enrol", enrol) }]),
  ];
  if (ip === "" || ports.length === 0) return [];
  const common = { clock: systemClock, random: Math.random, namespace, onTrouble };
  return [leaderEndpointPart({ ...common, address: ip, ports })];
}

function portOf(flag: string, address: string): number {
  const port = Number(/:(\d{1,5})$/.exec(address)?.[1]);
  if (port >= 1 && port <= 65_535) return port;
  throw new FaultError(
    invalid(flag, `"${address}" is not host:port; the port is told to pods, so that it cannot be 0`),
  );
}
