#!/usr/bin/env python3
"""The OpenAI-style API through real processes: batches, echo with scores, chat, its neighbours and its headers."""

import http.client
import json
import math
import signal
import socket
import time
import unittest

import texts
from cluster import (MODEL_DIR, REQUEST_S, SETTLE_S, START_S, Cluster, ClusterTest, Stream, http_request,
                     wait_until)


class ApiTest(ClusterTest):
    @classmethod
    def setUpClass(cls):
        cls.cluster = cls.enterClassContext(Cluster())
        cls.cluster.wait_ready()
        cls.port = cls.cluster.router.http_port

    def post(self, path, body, expect_status=200):
        status, _, text = http_request(self.port, "POST", path, {"model": "zeroc-demo", **body})
        self.assertEqual(status, expect_status, text[:1000])
        return json.loads(text)

    def tokens(self, text):
        return self.post("/tokenize", {"prompt": text})["tokens"]

    def test_batch_answers_as_alone(self):
        prompts = [texts.prose(200 + 300 * i, start=1000 * i) for i in range(3)]
        alone = [self.cluster.complete(p, max_tokens=8, ignore_eos=True)["choices"][0]["text"] for p in prompts]
        batch = self.cluster.complete(prompts, max_tokens=8, ignore_eos=True)
        self.assertEqual([c["index"] for c in batch["choices"]], [0, 1, 2])
        self.assertEqual([c["text"] for c in batch["choices"]], alone)
        self.assertEqual(batch["usage"]["completion_tokens"], 24)
        ids = [self.tokens(p) for p in prompts]
        self.assertEqual(batch["usage"]["prompt_tokens"], sum(map(len, ids)))
        by_ids = self.cluster.complete(ids, max_tokens=8, ignore_eos=True)
        self.assertEqual([c["text"] for c in by_ids["choices"]], alone)

    def test_more_choices_than_run_at_once(self):
        prompts = [texts.prose(100, start=50 * i) for i in range(40)]
        batch = self.cluster.complete(prompts, max_tokens=2, ignore_eos=True)
        self.assertEqual([c["index"] for c in batch["choices"]], list(range(40)))
        one = self.cluster.complete(prompts[39], max_tokens=2, ignore_eos=True)
        self.assertEqual(batch["choices"][39]["text"], one["choices"][0]["text"])

    def test_n_answers_differ_and_repeat(self):
        fields = {"n": 3, "max_tokens": 12, "temperature": 1.0, "seed": 3, "ignore_eos": True}
        one = [c["text"] for c in self.cluster.complete(texts.SHORT, **fields)["choices"]]
        again = [c["text"] for c in self.cluster.complete(texts.SHORT, **fields)["choices"]]
        self.assertEqual(one, again)
        self.assertEqual(len(set(one)), 3)

    def test_streamed_batch_has_every_choice_whole(self):
        prompts = [texts.prose(200), texts.prose(400, start=900)]
        whole = self.cluster.complete(prompts, max_tokens=10, ignore_eos=True)
        stream = self.cluster.stream(prompts, max_tokens=10, ignore_eos=True, stream_options={"include_usage": True})
        streamed, finished, usage = ["", ""], [], None
        for event in stream.events():
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                streamed[choice["index"]] += choice["text"]
                if choice["finish_reason"]:
                    finished.append(choice["index"])
        self.assertTrue(stream.done)
        self.assertEqual(streamed, [c["text"] for c in whole["choices"]])
        self.assertEqual(sorted(finished), [0, 1])
        self.assertEqual(usage, whole["usage"])

    def test_one_bad_prompt_of_a_batch_is_one_error(self):
        error = self.post("/v1/completions", {"prompt": ["fine", ""], "max_tokens": 4}, 400)["error"]
        self.assertEqual(error["param"], "prompt")
        self.assertEqual(error["type"], "invalid_request_error")

    def test_echo_scores_every_prompt_token(self):
        text = texts.prose(600)
        ids = self.tokens(text)
        scored = self.cluster.complete([ids], echo=True, logprobs=1, max_tokens=1)
        lists = scored["choices"][0]["logprobs"]
        self.assertEqual({len(x) for x in lists.values()}, {len(ids) + 1})
        self.assertIsNone(lists["token_logprobs"][0])
        for logprob, top in zip(lists["token_logprobs"][1:], lists["top_logprobs"][1:]):
            self.assertLessEqual(logprob, max(top.values()) + 1e-6)
        self.assertEqual(scored["usage"]["prompt_tokens"], len(ids))
        self.assertEqual(scored["usage"]["completion_tokens"], 1)
        # The greedy answer scored as a prompt has the log probabilities that it was drawn with, up to what the
        # compression of the tokens between changes.
        drawn = self.cluster.complete(text, max_tokens=16, logprobs=0, ignore_eos=True, profile="bf16")["choices"][0]
        told = drawn["logprobs"]["token_logprobs"]
        body = {"prompt": text, "max_tokens": 16, "ignore_eos": True, "temperature": 0, "profile": "bf16"}
        answer = self.post("/v1/completions", body)["choices"][0]["text"]
        again = self.tokens(text + answer)
        self.assertEqual((again[:len(ids)], len(again)), (ids, len(ids) + 16), "the answer is read as it was written")
        back = self.cluster.complete([again], echo=True, logprobs=1, max_tokens=0, profile="bf16")
        for one, two in zip(back["choices"][0]["logprobs"]["token_logprobs"][-16:], told):
            self.assertAlmostEqual(one, two, delta=0.05)

    def test_scores_do_not_depend_on_where_prefill_ends(self):
        ids = self.tokens(texts.prose(900))
        fields = {"echo": True, "logprobs": 0, "max_tokens": 0, "profile": "bf16"}
        all_scored = self.cluster.complete([ids], **fields)["choices"][0]["logprobs"]["token_logprobs"]
        half = len(ids) // 2
        later = self.cluster.complete([ids], score_from=half, **fields)["choices"][0]["logprobs"]["token_logprobs"]
        self.assertEqual(later[:half], [None] * half)
        for one, two in zip(all_scored[half:], later[half:]):
            self.assertAlmostEqual(one, two, delta=0.1)
        mean = sum(all_scored[1:]) / (len(ids) - 1)
        self.assertTrue(-7 < mean < -1, f"mean log probability {mean} (perplexity {math.exp(-mean)})")

    def test_prompt_logprobs_are_what_echo_scores(self):
        ids = self.tokens(texts.prose(300))
        fields = {"max_tokens": 4, "ignore_eos": True, "logprobs": 1}
        echoed = self.cluster.complete([ids], echo=True, **fields)["choices"][0]
        told = self.cluster.complete([ids], prompt_logprobs=3, **fields)["choices"][0]
        self.assertEqual(len(told["prompt_logprobs"]), len(ids))
        self.assertIsNone(told["prompt_logprobs"][0])
        for i in range(1, len(ids)):
            entry = told["prompt_logprobs"][i]
            self.assertIn(len(entry), (3, 4), "the best three, and the token itself")
            self.assertEqual(entry[str(ids[i])]["logprob"], echoed["logprobs"]["token_logprobs"][i])
            self.assertEqual(sorted(e["rank"] for e in entry.values() if e["rank"]), [1, 2, 3])
        self.assertEqual(echoed["text"][-len(told["text"]):], told["text"])
        self.assertEqual(len(told["logprobs"]["tokens"]), 4, "the answer's own")
        self.assertEqual(told["logprobs"]["token_logprobs"], echoed["logprobs"]["token_logprobs"][-4:])
        chat = self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2,
                                                  "prompt_logprobs": 0, "temperature": 0})
        self.assertEqual(len(chat["prompt_logprobs"]), chat["usage"]["prompt_tokens"])
        self.assertEqual(self.post("/v1/completions", {"prompt": "x", "prompt_logprobs": 1, "stream": True}, 400)
                         ["error"]["param"], "prompt_logprobs")

    def test_what_stopped_the_answer_is_told(self):
        free = self.cluster.complete(texts.SHORT, max_tokens=24, ignore_eos=True, return_token_ids=True)["choices"][0]
        self.assertIsNone(free["stop_reason"])
        stop = free["text"][len(free["text"]) // 2:][:4]
        before = free["text"][:free["text"].index(stop)]
        cut = self.cluster.complete(texts.SHORT, max_tokens=24, ignore_eos=True, stop=[stop])["choices"][0]
        self.assertEqual((cut["text"], cut["finish_reason"], cut["stop_reason"]), (before, "stop", stop))
        kept = self.cluster.complete(texts.SHORT, max_tokens=24, ignore_eos=True, stop=[stop],
                                     include_stop_str_in_output=True)["choices"][0]
        self.assertEqual((kept["text"], kept["stop_reason"]), (before + stop, stop))
        token = free["token_ids"][7]
        stream = self.cluster.stream(texts.SHORT, max_tokens=24, ignore_eos=True, stop_token_ids=[token])
        last = [c for event in stream.events() for c in event["choices"]][-1]
        self.assertEqual((last["finish_reason"], last["stop_reason"]), ("stop", token))
        # A stop string ends the answer, not the prompt that is scored with it.
        both = self.cluster.complete(texts.SHORT, max_tokens=4, ignore_eos=True, echo=True, logprobs=0,
                                     stop=[texts.SHORT[:6]])["choices"][0]
        self.assertTrue(both["text"].startswith(texts.SHORT))
        self.assertEqual(both["finish_reason"], "length")

    def test_echo_alone(self):
        answer = self.cluster.complete(texts.SHORT, echo=True, max_tokens=0)
        self.assertEqual(answer["choices"][0]["text"], texts.SHORT)
        self.assertEqual(answer["usage"]["completion_tokens"], 0)
        longer = self.cluster.complete(texts.SHORT, echo=True, max_tokens=4, ignore_eos=True)
        self.assertTrue(longer["choices"][0]["text"].startswith(texts.SHORT))

    def test_min_tokens_and_logit_bias(self):
        info = self.cluster.complete(texts.SHORT, max_tokens=6, logprobs=1, ignore_eos=True)["choices"][0]
        first = self.post("/tokenize", {"prompt": info["logprobs"]["tokens"][0], "add_special_tokens": False})
        self.assertEqual(first["count"], 1)
        token = first["tokens"][0]
        stopped = self.cluster.complete(texts.SHORT, max_tokens=6, stop_token_ids=[token])
        self.assertEqual(stopped["usage"]["completion_tokens"], 1)
        longer = self.cluster.complete(texts.SHORT, max_tokens=6, stop_token_ids=[token], min_tokens=4)
        self.assertGreaterEqual(longer["usage"]["completion_tokens"], 4)
        banned = self.cluster.complete(texts.SHORT, max_tokens=1, logit_bias={str(token): -100}, ignore_eos=True)
        self.assertNotEqual(banned["choices"][0]["text"], info["logprobs"]["tokens"][0])
        forced = self.cluster.complete(texts.SHORT, max_tokens=3, logit_bias={"300": 100}, ignore_eos=True, logprobs=0)
        self.assertEqual(len(set(forced["choices"][0]["logprobs"]["tokens"])), 1)

    def test_token_ids_running_usage_and_texts_without_bos(self):
        ids = self.tokens(texts.SHORT)
        whole = self.cluster.complete(texts.SHORT, max_tokens=6, ignore_eos=True, return_token_ids=True)["choices"][0]
        self.assertEqual(whole["prompt_token_ids"], ids)
        self.assertEqual(len(whole["token_ids"]), 6)
        self.assertEqual(self.post("/detokenize", {"tokens": whole["token_ids"]})["prompt"], whole["text"])
        stream = self.cluster.stream(texts.SHORT, max_tokens=6, ignore_eos=True, return_token_ids=True,
                                     stream_options={"include_usage": True, "continuous_usage_stats": True})
        events = list(stream.events())
        self.assertEqual([i for e in events for c in e["choices"] for i in c.get("token_ids", [])], whole["token_ids"])
        counts = [e["usage"]["completion_tokens"] for e in events]
        self.assertEqual((counts, counts[-1]), (sorted(counts), 6))
        bare = self.post("/tokenize", {"prompt": texts.SHORT, "add_special_tokens": False, "return_token_strs": True})
        self.assertEqual("".join(bare["token_strs"]), texts.SHORT)
        self.assertEqual(ids[1:], bare["tokens"])
        as_ids = self.cluster.complete(bare["tokens"], max_tokens=6, ignore_eos=True)
        as_text = self.cluster.complete(texts.SHORT, max_tokens=6, ignore_eos=True, add_special_tokens=False)
        self.assertEqual(as_text["choices"][0]["text"], as_ids["choices"][0]["text"])
        self.assertEqual(as_text["usage"]["prompt_tokens"], len(bare["tokens"]))

    def test_chat_is_its_template_completed(self):
        messages = [{"role": "user", "content": "Tell me about the sea."}]
        chat = self.post("/v1/chat/completions", {"messages": messages, "max_tokens": 8, "temperature": 0,
                                                  "logprobs": True, "top_logprobs": 2})
        self.assertEqual(chat["object"], "chat.completion")
        self.assertEqual(chat["choices"][0]["message"]["role"], "assistant")
        prompt = "<|bos|><|user|>Tell me about the sea.<|assistant|>"
        same = self.cluster.complete(prompt, max_tokens=8)
        self.assertEqual(chat["choices"][0]["message"]["content"], same["choices"][0]["text"])
        self.assertEqual(chat["usage"]["prompt_tokens"], same["usage"]["prompt_tokens"])
        self.assertEqual(self.post("/tokenize", {"messages": messages})["tokens"], self.tokens(prompt))
        content = chat["choices"][0]["logprobs"]["content"]
        self.assertEqual(len(content), chat["usage"]["completion_tokens"])
        self.assertEqual(len(content[0]["top_logprobs"]), 2)

        stream = Stream(self.port, {"model": "zeroc-demo", "messages": messages, "max_tokens": 8, "temperature": 0,
                                    "stream": True, "stream_options": {"include_usage": True}},
                        path="/v1/chat/completions")
        events = list(stream.events())
        self.assertTrue(stream.done)
        self.assertEqual(events[0]["choices"][0]["delta"], {"role": "assistant", "content": ""})
        text = "".join(c["delta"].get("content", "") for e in events for c in e["choices"])
        self.assertEqual(text, chat["choices"][0]["message"]["content"])
        self.assertEqual(events[-1]["usage"], chat["usage"])

    def test_chat_refusals(self):
        for field, value in (("tools", [{"type": "function"}]), ("messages", []), ("tool_choice", "auto"),
                             ("response_format", {"type": "json_object"})):
            with self.subTest(field=field):
                body = {"messages": [{"role": "user", "content": "x"}], field: value}
                self.assertEqual(self.post("/v1/chat/completions", body, 400)["error"]["param"], field)

    def test_neighbours(self):
        for path in ("/health", "/ping"):
            self.assertEqual(self.cluster.router.status(path), 200, path)
        self.assertRegex(json.loads(http_request(self.port, "GET", "/version")[2])["version"], r"^\d+\.\d+")
        self.assertEqual(json.loads(http_request(self.port, "GET", "/load")[2]), {"server_load": 0})
        models = json.loads(http_request(self.port, "GET", "/v1/models")[2])
        self.assertEqual(models["data"][0]["id"], "zeroc-demo")
        self.assertEqual(json.loads(http_request(self.port, "GET", "/v1/models/zeroc-demo")[2]), models["data"][0])
        info = json.loads(http_request(self.port, "GET", "/tokenizer_info")[2])
        config = json.loads((MODEL_DIR / "tokenizer_config.json").read_text())
        self.assertEqual({**info, **config}, info)
        self.assertIn("tokenizer_class", info)
        ids = self.tokens(texts.SHORT)
        self.assertIn(texts.SHORT, self.post("/detokenize", {"tokens": ids})["prompt"])

    def test_ids_and_traces_come_back(self):
        trace = "4bf92f3577b34da6a3ce929d0e0e4736"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_S)
        body = json.dumps({"prompt": texts.SHORT, "max_tokens": 2})
        headers = {"X-Request-Id": "my-request", "traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
        connection.request("POST", "/v1/completions", body=body, headers=headers)
        response = connection.getresponse()
        response.read()
        self.assertEqual(response.status, 200)
        self.assertEqual(response.headers["X-Request-Id"], "my-request")
        self.assertTrue(response.headers["traceparent"].startswith(f"00-{trace}-"))
        self.assertNotIn("00f067aa0ba902b7", response.headers["traceparent"])
        connection.close()
        lines = [line for line in self.cluster.router.log().splitlines() if trace in line]
        self.assertTrue(any("my-request" in line for line in lines), "the trace is in no log line of the request")


class StoppingTest(ClusterTest):
    def test_answers_that_are_being_read_are_finished(self):
        with Cluster(n_decode=0, n_prefill=0) as cluster:
            wait_until(lambda: cluster.router.status("/healthz") == 200, START_S, "the router answers")
            # An answer of 16 MB, more than the kernel holds for a client that reads nothing.
            prompt = "the sea " * 50_000
            body = json.dumps({"prompt": prompt, "n": 40, "echo": True, "max_tokens": 0}).encode()
            with socket.create_connection(("127.0.0.1", cluster.router.http_port), timeout=REQUEST_S) as client:
                client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: test\r\n"
                               b"Content-Length: %d\r\n\r\n" % len(body) + body)
                response = http.client.HTTPResponse(client)
                response.begin()
                self.assertEqual(response.status, 200)
                cluster.router.signal(signal.SIGTERM)
                wait_until(lambda: "stopping" in cluster.router.log(), SETTLE_S, "the router says that it stops")
                time.sleep(0.5)
                answer = json.loads(response.read())
            self.assertEqual([choice["text"] == prompt for choice in answer["choices"]], [True] * 40)
            self.assertEqual(cluster.router.wait_exit(), 0)


if __name__ == "__main__":
    unittest.main()
