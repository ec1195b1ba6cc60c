// A raw HTTP client for answers: what the bytes say, not what a library makes of them.

// biome-ignore lint/suspicious/noExplicitAny: bodies are compared by expectations, whatever they hold
type Json = any;

export type Answer = { status: number; headers: Headers; body: Json };

/** One request; the body as JSON where it is some. */
export async function ask(url: string, path: string, body?: object | string, init: RequestInit = {}): Promise<Answer> {
  const response = await fetch(url + path, {
    ...(body === undefined ? {} : { method: "POST", body: typeof body === "string" ? body : JSON.stringify(body) }),
    ...init,
    headers: { ...(body === undefined ? {} : { "content-type": "application/json" }), ...init.headers },
  });
  const text = await response.text();
  const isJson = response.headers.get("content-type")?.includes("json") === true && text !== "";
  return { status: response.status, headers: response.headers, body: isJson ? JSON.parse(text) : text };
}

export async function openSse(url: string, path: string, body: object, signal?: AbortSignal): Promise<Response> {
  const response = await fetch(url + path, {
    method: "POST",
    body: JSON.stringify(body),
    headers: { "content-type": "application/json" },
    ...(signal ? { signal } : {}),
  });
  if (!response.headers.get("content-type")?.startsWith("text/event-stream")) {
    throw new Error(`not a stream: ${response.status} ${await response.text()}`);
  }
  return response;
}

export type Collected = {
  text: string;
  texts: string[];
  ids: number[];
  /** Every `system_fingerprint` that was said. */
  fingerprints: Set<string>;
  finish: string;
  usage: Json;
  error: Json;
  comments: string[];
  isDone: boolean;
};

/** Everything a stream of completions brought. */
export async function chunksOf(response: Response): Promise<Collected> {
  const got: Collected = {
    text: "",
    texts: [],
    ids: [],
    fingerprints: new Set(),
    finish: "",
    usage: undefined,
    error: undefined,
    comments: [],
    isDone: false,
  };
  for (const event of (await response.text()).split("\n\n")) {
    if (event.startsWith(":")) got.comments.push(event);
    if (!event.startsWith("data: ")) continue;
    const data = event.slice(6);
    if (data === "[DONE]") {
      got.isDone = true;
      continue;
    }
    const { choices = [], usage, error, system_fingerprint: fingerprint } = JSON.parse(data);
    if (fingerprint !== undefined) got.fingerprints.add(fingerprint);
    if (error) got.error = error;
    if (usage) got.usage = usage;
    for (const choice of choices) take(got, choice);
  }
  got.text = got.texts[0] ?? "";
  return got;
}

function take(got: Collected, choice: Json): void {
  const text: string = choice.text ?? choice.delta?.content ?? "";
  got.texts[choice.index] = (got.texts[choice.index] ?? "") + text;
  if (choice.finish_reason) got.finish = choice.finish_reason;
  if (choice.index === 0 && choice.muster) got.ids.push(...choice.muster.token_ids);
}
