"""The official OpenAI SDK for Python, unchanged: configured by OPENAI_BASE_URL and OPENAI_API_KEY alone."""

import asyncio

import openai

print("openai", openai.__version__)
client = openai.OpenAI(max_retries=0, timeout=60)
model = client.models.list().data[0].id
assert client.models.retrieve(model).id == model

# Completions: whole, streamed, several answers, echo, scores.
fixed = {"model": model, "prompt": "Everyone is permitted to", "max_tokens": 16, "temperature": 0}
whole = client.completions.create(**fixed)
assert whole.object == "text_completion" and whole.usage.completion_tokens <= 16
assert whole.choices[0].finish_reason in ("stop", "length")
streamed, usage = "", None
for chunk in client.completions.create(**fixed, stream=True, stream_options={"include_usage": True}):
    usage = chunk.usage or usage
    streamed += "".join(choice.text for choice in chunk.choices)
assert streamed == whole.choices[0].text, (streamed, whole)
assert usage == whole.usage, (usage, whole.usage)
several = client.completions.create(**{**fixed, "temperature": 1.0}, n=3, seed=7, logprobs=2, echo=True)
assert [choice.index for choice in several.choices] == [0, 1, 2]
for choice in several.choices:
    assert choice.text.startswith(fixed["prompt"])
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs)
    assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])
batch = client.completions.create(**{**fixed, "prompt": ["One.", "Two."]}, stop=["."], logit_bias={"5": -100})
assert len(batch.choices) == 2 and all("." not in choice.text for choice in batch.choices)

# Chat: whole, streamed by the SDK's own accumulator, scores.
messages = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "What is free software?"}]
chat = client.chat.completions.create(model=model, messages=messages, max_completion_tokens=12, temperature=0,
                                      logprobs=True, top_logprobs=3)
assert chat.choices[0].message.role == "assistant"
assert len(chat.choices[0].logprobs.content) == chat.usage.completion_tokens
assert all(len(token.top_logprobs) == 3 for token in chat.choices[0].logprobs.content)
with client.chat.completions.stream(model=model, messages=messages, max_completion_tokens=12, temperature=0) as stream:
    content = "".join(event.delta for event in stream if event.type == "content.delta")
    final = stream.current_completion_snapshot
assert content == final.choices[0].message.content == chat.choices[0].message.content, (content, final, chat)

# Our own fields pass through the SDK both ways.
ours = client.completions.create(**fixed, extra_body={"max_ppl_increase": 0.0})
assert ours.model_extra["zeroc"]["profile"] == "bf16", ours
assert client.completions.with_raw_response.create(**fixed).headers["x-request-id"]


def expect(error, call):
    try:
        call()
    except error as caught:
        return caught
    raise AssertionError(f"no {error.__name__}")


bad = expect(openai.BadRequestError, lambda: client.completions.create(**{**fixed, "temperature": 9}))
assert bad.param == "temperature", bad
expect(openai.NotFoundError, lambda: client.completions.create(**{**fixed, "model": "other"}))
expect(openai.AuthenticationError, lambda: client.with_options(api_key="wrong").models.list())


async def many():
    """Streams side by side, a third of them left early; the rest are whole and alike."""
    asynchronous = openai.AsyncOpenAI(max_retries=0, timeout=60)

    async def one(i):
        text = ""
        stream = await asynchronous.completions.create(**fixed, stream=True)
        async for chunk in stream:
            text += chunk.choices[0].text if chunk.choices else ""
            if i % 3 == 0:
                await stream.close()
                return None
        return text

    texts = await asyncio.gather(*(one(i) for i in range(24)))
    await asynchronous.close()
    assert {text for text in texts if text is not None} == {whole.choices[0].text}, texts


asyncio.run(many())
