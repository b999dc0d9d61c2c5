// Uses the official OpenAI client as its documentation does and prints what happened, as one JSON object.
import OpenAI from "openai";

const [baseURL] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "right", maxRetries: 0 });
const story = process.env.STORY;
const failsLate = process.env.FAILS_LATE;

async function speak(fields) {
  return client.audio.speech.create({ model: "gpt-4o-mini-tts", voice: "coral", input: story, ...fields });
}

async function whole(fields) {
  const response = await speak(fields);
  const bytes = Buffer.from(await response.arrayBuffer());
  return {
    type: response.headers.get("content-type"),
    cache: response.headers.get("x-cache"),
    voice: response.headers.get("x-voice"),
    base64: bytes.toString("base64"),
  };
}

async function streamed(fields) {
  const response = await speak(fields);
  const started = performance.now();
  const chunks = [];
  let firstMs = null;
  for await (const chunk of response.body) {
    firstMs ??= performance.now() - started;
    chunks.push(Buffer.from(chunk));
  }
  return { chunks: chunks.length, firstMs, totalMs: performance.now() - started, base64: Buffer.concat(chunks).toString("base64") };
}

// What a machine that stood still for a moment would spoil: tried again, with another seed.
async function steadily(work, good) {
  let result;
  for (let seed = 10; seed < 16; seed++) {
    result = await work(seed);
    if (good(result)) break;
  }
  return result;
}

async function events(fields) {
  const response = await speak({ stream_format: "sse", ...fields });
  const text = await response.text();
  return { type: response.headers.get("content-type"), text };
}

async function failure(work) {
  try {
    await work();
    return null;
  } catch (error) {
    const { status, code, param, type, message } = error;
    return { name: error.constructor.name, status, code, param, type, message, requestID: error.requestID };
  }
}

const results = {
  mp3: await whole({ seed: 1 }),
  wav: await whole({ response_format: "wav" }),
  again: await whole({ response_format: "wav" }),
  voiceObject: await whole({ voice: { id: "nova" }, response_format: "pcm", speed: 2 }),
  streamed: await steadily(
    (seed) => streamed({ response_format: "mp3", seed }),
    ({ chunks, firstMs, totalMs }) => chunks >= 4 && firstMs < totalMs / 2,
  ),
  events: await events({ seed: 3 }),
  failedEvents: await events({ input: failsLate }),
  models: (await client.models.list()).data.map((model) => model.id),
  model: (await client.models.retrieve("tts-1")).id,
  errors: {
    badRequest: await failure(() => speak({ voice: "nobody" })),
    tooFast: await failure(() => speak({ speed: 9 })),
    notFound: await failure(() => client.models.retrieve("no-such-model")),
    authentication: await failure(() => new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 }).audio.speech.create({ model: "tts-1", voice: "alloy", input: "a" })),
    failed: await failure(() => speak({ input: "This will FAIL." })),
    cut: await failure(async () => (await speak({ input: failsLate, response_format: "wav" })).arrayBuffer()),
  },
};
console.log(JSON.stringify(results));
