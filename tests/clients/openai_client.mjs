// The official OpenAI SDK for JavaScript, unchanged: configured by OPENAI_BASE_URL and OPENAI_API_KEY alone.
import assert from "node:assert/strict";

import OpenAI from "openai";

const client = new OpenAI({ maxRetries: 0, timeout: 60_000 });
const models = await client.models.list();
const model = models.data[0].id;

const fixed = { model, prompt: "Everyone is permitted to", max_tokens: 16, temperature: 0 };
const whole = await client.completions.create(fixed);
assert.equal(whole.object, "text_completion");
let streamed = "";
let usage = null;
for await (const chunk of await client.completions.create({
  ...fixed, stream: true, stream_options: { include_usage: true } })) {
  usage = chunk.usage ?? usage;
  for (const choice of chunk.choices) streamed += choice.text;
}
assert.equal(streamed, whole.choices[0].text);
assert.deepEqual(usage, whole.usage);

const messages = [{ role: "user", content: "What is free software?" }];
const chat = await client.chat.completions.create({ model, messages, max_completion_tokens: 12, temperature: 0 });
assert.equal(chat.choices[0].message.role, "assistant");
const final = await client.chat.completions
  .stream({ model, messages, max_completion_tokens: 12, temperature: 0 }).finalChatCompletion();
assert.equal(final.choices[0].message.content, chat.choices[0].message.content);

await assert.rejects(client.completions.create({ ...fixed, temperature: 9 }), OpenAI.BadRequestError);
await assert.rejects(client.completions.create({ ...fixed, model: "other" }), OpenAI.NotFoundError);
await assert.rejects(client.withOptions({ apiKey: "wrong" }).models.list(), OpenAI.AuthenticationError);

// A stream that its reader leaves.
const left = await client.completions.create({ ...fixed, max_tokens: 1000, ignore_eos: true, stream: true });
for await (const chunk of left) {
  if (chunk.choices.length > 0) break;
}
