"""lm-evaluation-harness with its model `local-completions`, unchanged, on three small tasks over prose of the machine:
a choice between the true continuation and the same words shuffled (echo with scores),
perplexity over whole texts, and generation up to a stop string.
"""

import json
import os
import pathlib
import random
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "e2e"))
import texts  # noqa: E402

WORK = pathlib.Path(os.environ["ZEROC_WORK"])
N_CASES = 24
COMMON = """
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
metadata: {{version: 1}}
"""
TASKS = {
    "zeroc_choice": """
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
""",
    "zeroc_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
""",
    "zeroc_generate": """
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{text}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 16, temperature: 0}}
metric_list: [{{metric: exact_match}}]
""",
}


def cases():
    draw = random.Random(11)
    for i in range(N_CASES):
        words = texts.prose(200, start=150 * i).split()
        split = len(words) // 2
        true = words[split:split + 8]
        shuffled = true[:]
        while shuffled == true:
            draw.shuffle(shuffled)
        yield {"context": " ".join(words[:split]), "choices": [" " + " ".join(true), " " + " ".join(shuffled)],
               "text": " ".join(words)}


data = WORK / "cases.jsonl"
data.write_text("".join(json.dumps(case) + "\n" for case in cases()))
for name, task in TASKS.items():
    (WORK / f"{name}.yaml").write_text(f"task: {name}\n" + (COMMON + task).format(data=data))

arguments = {"model": "zeroc-demo", "base_url": os.environ["OPENAI_BASE_URL"] + "/completions", "num_concurrent": 4,
             "max_retries": 1, "tokenizer": os.environ["ZEROC_MODEL_DIR"], "tokenizer_backend": "huggingface"}
subprocess.run([sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args",
                ",".join(f"{key}={value}" for key, value in arguments.items()), "--tasks", ",".join(TASKS),
                "--include_path", WORK, "--output_path", WORK / "results", "--log_samples"], check=True,
               env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})

results = json.loads(next(WORK.glob("results/**/results_*.json")).read_text())
found = results["results"]
print("lm_eval", results.get("lm_eval_version"), json.dumps(found))
accuracy = found["zeroc_choice"]["acc,none"]
assert accuracy >= 0.75, "the true continuation is the likelier one; half would be chance"
bits = found["zeroc_text"]["bits_per_byte,none"]
assert 0.3 < bits < 4, bits
samples = [json.loads(line) for path in WORK.glob("results/**/samples_zeroc_generate_*.jsonl")
           for line in path.read_text().splitlines()]
answers = [sample["resps"][0][0] for sample in samples]
assert len(answers) == N_CASES and sum(map(bool, answers)) > N_CASES / 2 and not any("." in a for a in answers), answers
