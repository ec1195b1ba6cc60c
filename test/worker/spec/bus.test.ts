// One suite for both buses, and what a real nats-server adds: it can be away, and it takes no message of any size.
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { type Bus, MemoryBus, natsBus } from "../../../worker/spec/bus.ts";
import { NatsServer } from "../../nats-server.ts";
import { until } from "../../until.ts";

const TOKEN = "of-this-test";
const PAYLOAD_MAX = 1024 * 1024;

const server = new NatsServer();
const start = () => server.start(["--auth", TOKEN]);
const connect = (name: string): Bus => natsBus({ url: `nats://127.0.0.1:${server.port}`, token: TOKEN, name });

beforeAll(start);
afterAll(() => server.end());

type Ends = { from: Bus; to: Bus };

const buses: { name: string; open: () => Ends }[] = [
  {
    name: "in memory",
    open: () => {
      const bus = new MemoryBus();
      return { from: bus, to: bus };
    },
  },
  { name: "over a nats-server", open: () => ({ from: connect("from"), to: connect("to") }) },
];

/** Publishes until one arrives: what is sent before a subscription stands is lost, and may be. */
async function heard({ from }: Ends, subject: string, list: unknown[]): Promise<void> {
  const before = list.length;
  await until(() => {
    from.publish(subject, Uint8Array.of(0));
    return list.length > before;
  }, `a message on ${subject} arrives`);
}

describe.each(buses)("a bus $name", ({ open }) => {
  test("brings what is published to those who listen, in order, and to nobody else", async () => {
    const ends = open();
    const got: string[] = [];
    const others: string[] = [];
    const ready: string[] = [];
    ends.to.subscribe("spec.v1.d.*.c", (data, subject) => got.push(`${subject} ${data[0]}`));
    ends.to.subscribe("spec.v1.d.*", (_, subject) => others.push(subject));
    ends.to.subscribe("ready", (_, subject) => ready.push(subject));
    await heard(ends, "ready", ready);
    for (let i = 0; i < 50; i++) ends.from.publish(`spec.v1.d.${i % 3}.c`, Uint8Array.of(i));
    ends.from.publish("spec.v1.t.1.p", Uint8Array.of(9));
    await until(() => got.length === 50, "50 messages arrive");
    await heard(ends, "ready", ready);
    expect(got).toEqual(Array.from({ length: 50 }, (_, i) => `spec.v1.d.${i % 3}.c ${i}`));
    expect(others).toEqual([]);
    await Promise.all([ends.from.close(), ends.to.close()]);
  });

  test("brings nothing after the end of a subscription, and takes anything after its own", async () => {
    const ends = open();
    const got: string[] = [];
    const ready: string[] = [];
    const end = ends.to.subscribe("a", (_, subject) => got.push(subject));
    ends.to.subscribe("ready", (_, subject) => ready.push(subject));
    await heard(ends, "a", got);
    await heard(ends, "ready", ready); // whatever was sent on "a" before has come
    end();
    const before = got.length;
    ends.from.publish("a", Uint8Array.of(1));
    await heard(ends, "ready", ready);
    expect(got.length).toBe(before);
    await Promise.all([ends.from.close(), ends.to.close()]);
    ends.from.publish("a", Uint8Array.of(1));
  });
});

describe("a bus over a nats-server", () => {
  test("drops what the server would not take, and brings what comes after it", async () => {
    const ends = { from: connect("from"), to: connect("to") };
    const sizes: number[] = [];
    ends.to.subscribe("a", (data) => sizes.push(data.length));
    await heard(ends, "a", sizes);
    ends.from.publish("a", new Uint8Array(PAYLOAD_MAX + 1));
    ends.from.publish("a", new Uint8Array(PAYLOAD_MAX));
    await until(() => sizes.includes(PAYLOAD_MAX), "the largest message arrives");
    expect(Math.max(...sizes)).toBe(PAYLOAD_MAX);
    await Promise.all([ends.from.close(), ends.to.close()]);
  });

  test("a server that dies is missed by nobody, and heard again when it is back", async () => {
    const ends = { from: connect("from"), to: connect("to") };
    const got: number[] = [];
    ends.to.subscribe("a", (data) => got.push(data.length));
    await heard(ends, "a", got);
    await server.kill();
    await until(() => !ends.from.isConnected, "the loss is seen");
    ends.from.publish("a", new Uint8Array(5));
    await start();
    await heard(ends, "a", got);
    expect(ends.from.isConnected).toBe(true);
    expect(got).not.toContain(5); // at most once: nothing was kept
    await Promise.all([ends.from.close(), ends.to.close()]);
  });

  test("closes in time where no server ever was", async () => {
    const bus = natsBus({ url: "nats://127.0.0.1:1", token: TOKEN, name: "alone" });
    bus.publish("a", Uint8Array.of(1));
    expect(bus.isConnected).toBe(false);
    await bus.close();
  });
});
