import { generateKeyPair, SignJWT, UnsecuredJWT } from "jose";
import { describe, expect, test } from "vitest";
import { Tokens } from "../../../../controller/kube/trust/tokens.ts";
import { VirtualClock } from "../../../sim/virtual-clock.ts";
import { ClusterKeys, ISSUER, type TokenWish } from "./cluster-keys.ts";

async function bed() {
  const keys = await ClusterKeys.make();
  const clock = new VirtualClock();
  const tokens = new Tokens(keys.read, clock);
  return { keys, clock, tokens, token: (wish: TokenWish = {}) => keys.token({ nowMs: clock.nowMs(), ...wish }) };
}

describe("tokens", () => {
  test("K2: one of a pod, for us, by this cluster, is believed", async () => {
    const { tokens, token } = await bed();
    expect(await tokens.check(await token())).toEqual({
      kind: "believed",
      claims: { namespace: "models", pod: { name: "nano-d-0-1-0", uid: "uid-w" }, account: "muster-worker" },
    });
  });

  test.each<[string, TokenWish, string]>([
    ["another audience", { audience: "https://kubernetes.default.svc" }, "aud"],
    ["another issuer", { issuer: "https://elsewhere" }, "iss"],
    ["an end that has passed", { seconds: -60 }, "exp"],
    ["no pod", { pod: undefined }, "claim kubernetes.io.pod is missing"],
    ["an empty UID", { pod: { name: "a", uid: "" } }, "claim kubernetes.io.pod.uid is missing"],
  ])("K2: %s is refused", async (_, wish, why) => {
    const { tokens, token } = await bed();
    expect(await tokens.check(await token(wish))).toMatchObject({
      kind: "refused",
      detail: expect.stringContaining(why),
    });
  });

  test("K2: what was believed is refused once it has ended", async () => {
    const { tokens, token, clock } = await bed();
    const text = await token({ seconds: 600 });
    expect(await tokens.check(text)).toMatchObject({ kind: "believed" });
    await clock.runFor(700_000);
    expect(await tokens.check(text)).toMatchObject({ kind: "refused" });
  });

  test("K2: forged, changed, unsigned and no tokens are refused", async () => {
    const { tokens, token, clock } = await bed();
    const good = await token();
    const [head = "", body = "", signature = ""] = good.split(".");
    const claims = JSON.parse(Buffer.from(body, "base64url").toString());
    claims["kubernetes.io"].pod.uid = "uid-of-another";
    const other = Buffer.from(JSON.stringify(claims)).toString("base64url");
    const { privateKey } = await generateKeyPair("RS256");
    const forged = await new SignJWT({ "kubernetes.io": claims["kubernetes.io"] })
      .setProtectedHeader({ alg: "RS256", kid: "key-0" })
      .setIssuer(ISSUER)
      .setAudience("muster")
      .setIssuedAt(clock.nowMs() / 1000)
      .setExpirationTime(clock.nowMs() / 1000 + 60)
      .sign(privateKey);
    const symmetric = await new SignJWT(claims)
      .setProtectedHeader({ alg: "HS256", kid: "key-0" })
      .sign(Buffer.from("the public key as a secret, as libraries once believed"));
    const unsigned = new UnsecuredJWT(claims).encode();
    for (const text of [`${head}.${other}.${signature}`, forged, symmetric, unsigned, "", "a.b.c", good.slice(0, -8)])
      expect(await tokens.check(text)).toMatchObject({ kind: "refused" });
    expect(await tokens.check(good)).toMatchObject({ kind: "believed" });
  });

  test("K1: a thousand checks read the keys once", async () => {
    const { tokens, token, keys } = await bed();
    const text = await token();
    const verdicts = await Promise.all(Array.from({ length: 1_000 }, () => tokens.check(text)));
    expect(new Set(verdicts.map(({ kind }) => kind))).toEqual(new Set(["believed"]));
    expect(keys.reads.length).toBe(2);
  });

  test("K1: a key that is not known yet is read; keys that nobody has are asked for at a bounded rate", async () => {
    const { tokens, token, keys, clock } = await bed();
    await tokens.check(await token());
    await keys.rotate();
    expect(await tokens.check(await token())).toMatchObject({ kind: "believed" });
    expect(keys.reads.length).toBe(4);
    const stranger = await ClusterKeys.make();
    await stranger.rotate();
    await stranger.rotate();
    const strange = await stranger.token({ nowMs: clock.nowMs() });
    for (let i = 0; i < 100; i++) expect(await tokens.check(strange)).toMatchObject({ kind: "refused" });
    expect(keys.reads.length).toBeLessThanOrEqual(6);
    await clock.runFor(30_000);
    await tokens.check(strange);
    expect(keys.reads.length).toBeLessThanOrEqual(8);
  });

  test("K1: while the server is away the keys there are go on; before there are any it is too early", async () => {
    const { tokens, token, keys, clock } = await bed();
    keys.isAway = true;
    expect(await tokens.check(await token())).toMatchObject({
      kind: "early",
      detail: expect.stringContaining("the server is away"),
    });
    keys.isAway = false;
    await clock.runFor(10_000);
    expect(await tokens.check(await token())).toMatchObject({ kind: "believed" });
    keys.isAway = true;
    await clock.runFor(1_200_000); // old by now
    expect(await tokens.check(await token())).toMatchObject({ kind: "believed" });
  });
});
