"""Triton's gRPC client, unchanged, on the Open Inference Protocol: probes, metadata, one answer, streams, errors."""

import os
import queue

import numpy as np
import tritonclient
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

print("tritonclient", tritonclient.__version__ if hasattr(tritonclient, "__version__") else "")
HEADERS = {"authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"}
PROMPT = "Everyone is permitted to copy and distribute verbatim copies of this licence document. " * 12  # not local
GREEDY = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
client = triton.InferenceServerClient(os.environ["ZEROC_GRPC"])
assert client.is_server_live() and client.is_server_ready()
assert client.is_model_ready("zeroc-demo") and not client.is_model_ready("other")
assert client.get_server_metadata(headers=HEADERS).name == "zeroc"
metadata = client.get_model_metadata("zeroc-demo", headers=HEADERS)
assert [(i.name, i.datatype, list(i.shape)) for i in metadata.inputs] == [("text_input", "BYTES", [1]),
                                                                          ("streaming", "BOOL", [1])], metadata
config = client.get_model_config("zeroc-demo", headers=HEADERS).config
assert config.name == "zeroc-demo" and config.model_transaction_policy.decoupled, config
assert [(i.name, list(i.dims), i.optional) for i in config.input] == [("text_input", [1], False),
                                                                     ("streaming", [1], True)], config


def inputs(prompt, streaming):
    text = triton.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([prompt.encode()], dtype=np.object_))
    stream = triton.InferInput("streaming", [1], "BOOL")
    stream.set_data_from_numpy(np.array([streaming]))
    return [text, stream]


def text_of(result):
    return result.as_numpy("text_output")[0].decode()


def refused(code, call):
    try:
        call()
    except InferenceServerException as error:
        assert code in str(error.status()), (code, error)
        return error
    raise AssertionError(f"no {code}")


whole = client.infer("zeroc-demo", inputs(PROMPT, False), request_id="one", parameters=GREEDY, headers=HEADERS)
response = whole.get_response()
assert response.id == "one" and whole.as_numpy("finish_reason")[0] == b"length", response
assert response.parameters["completion_tokens"].int64_param == 12, response
assert all(response.parameters[f"kv_bytes_{kind}"].int64_param > 0 for kind in ("raw", "wire")), response
assert text_of(whole).strip(), response

# Streams side by side on one call: pieces that add up to the same text; then errors that leave the call alone.
answers = queue.Queue()
client.start_stream(lambda result, error: answers.put((result, error)), headers=HEADERS)
for i in range(6):
    client.async_stream_infer("zeroc-demo", inputs(PROMPT, True), request_id=f"s{i}", parameters=GREEDY,
                              enable_empty_final_response=i % 2 == 0)
texts, ended, n_pieces = {}, set(), 0
while len(ended) < 6:
    result, error = answers.get(timeout=60)
    assert error is None, error
    message = result.get_response()
    if message.outputs:
        texts[message.id] = texts.get(message.id, "") + text_of(result)
        n_pieces += 1
    if message.parameters["triton_final_response"].bool_param:
        ended.add(message.id)
assert set(texts.values()) == {text_of(whole)}, (texts, text_of(whole))
assert n_pieces > 6 * 6, n_pieces
client.async_stream_infer("zeroc-demo", inputs(PROMPT, True), request_id="bad", parameters={"temperature": 9.0})
result, error = answers.get(timeout=60)
assert error is not None and "temperature" in error.message(), (result, error)
client.async_stream_infer("zeroc-demo", inputs(PROMPT, False), request_id="after", parameters=GREEDY)
result, error = answers.get(timeout=60)
assert error is None and text_of(result) == text_of(whole), error
client.stop_stream()

# A stream that its reader leaves.
client.start_stream(lambda result, error: answers.put((result, error)), headers=HEADERS)
client.async_stream_infer("zeroc-demo", inputs(PROMPT, True), parameters={**GREEDY, "max_tokens": 3000})
answers.get(timeout=60)
client.stop_stream(cancel_requests=True)

refused("INVALID_ARGUMENT", lambda: client.infer("zeroc-demo", inputs("", False), headers=HEADERS))
refused("INVALID_ARGUMENT", lambda: client.infer("zeroc-demo", inputs(PROMPT, False), parameters={"no_such": 1},
                                                 headers=HEADERS))
refused("NOT_FOUND", lambda: client.infer("other", inputs(PROMPT, False), headers=HEADERS))
refused("UNAUTHENTICATED", lambda: client.infer("zeroc-demo", inputs(PROMPT, False)))
refused("DEADLINE_EXCEEDED", lambda: client.infer("zeroc-demo", inputs(PROMPT, False), timeout=2000,
                                                  parameters={**GREEDY, "max_tokens": 3000}, headers=HEADERS))
client.close()
