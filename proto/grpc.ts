// One place for gRPC client and server options, so that limits and keepalive agree on both ends of every link.
import type { ChannelOptions } from "@grpc/grpc-js";

/** Largest message either way: a ShardPlan of a 128-expert model with all of its tensors is about 8 MiB. */
export const MESSAGE_BYTES_MAX = 64 * 1024 * 1024;

/** Header in which a worker is told whom it is meant to be, and says who it is: the UID of its pod. */
export const POD_UID_HEADER = "muster-pod-uid";

export const channelOptions: ChannelOptions = {
  "grpc.max_receive_message_length": MESSAGE_BYTES_MAX,
  "grpc.max_send_message_length": MESSAGE_BYTES_MAX,
  "grpc.keepalive_time_ms": 10_000,
  "grpc.keepalive_timeout_ms": 5_000,
  "grpc.keepalive_permit_without_calls": 1,
  "grpc-node.flow_control_window": 1024 * 1024,
  // Sent instead of an IP address, which TLS does not allow; who a peer is does not hang on its name (trust.ts).
  "grpc.ssl_target_name_override": "muster",
  "grpc.initial_reconnect_backoff_ms": 100,
  "grpc.max_reconnect_backoff_ms": 2_000,
};
