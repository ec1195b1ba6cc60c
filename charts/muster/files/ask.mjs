// What `helm test` runs: the gateway lists its models and, where one is served, completes a text. Ends with 1 and one line
// that says what is wrong. MUSTER_URL, MUSTER_API_KEY.
const url = process.env.MUSTER_URL;
const headers = { authorization: `Bearer ${process.env.MUSTER_API_KEY}`, "content-type": "application/json" };
const CONNECT_MS_MAX = 60_000;
const ANSWER_MS_MAX = 120_000;

async function ask(path, body) {
  const call = { headers, signal: AbortSignal.timeout(ANSWER_MS_MAX) };
  const answer = await fetch(url + path, body ? { ...call, method: "POST", body: JSON.stringify(body) } : call);
  const text = await answer.text();
  if (!answer.ok) throw new Error(`${path} answers ${answer.status}: ${text.slice(0, 500)}`);
  return JSON.parse(text);
}

/** A gateway that has just been installed waits for the controller's certificate authority. */
async function models(deadline) {
  for (;;) {
    try {
      return (await ask("/v1/models")).data;
    } catch (error) {
      if (!(error instanceof TypeError) || Date.now() > deadline) throw error;
      await new Promise((wake) => setTimeout(wake, 1_000));
    }
  }
}

try {
  const names = (await models(Date.now() + CONNECT_MS_MAX)).map((model) => model.id);
  console.log(`models: ${names.join(", ") || "none yet; apply a ModelDeployment"}`);
  if (names.length > 0) {
    const body = { model: names[0], prompt: "Mr. Speaker,", max_tokens: 8, temperature: 0 };
    const { choices } = await ask("/v1/completions", body);
    if (typeof choices?.[0]?.text !== "string" || choices[0].text === "") throw new Error("a completion without text");
    console.log(`${names[0]}: ${JSON.stringify(choices[0].text)}`);
  }
} catch (error) {
  console.error(`muster test: ${error.message}${error.cause ? `: ${error.cause.message}` : ""}`);
  process.exitCode = 1;
}
