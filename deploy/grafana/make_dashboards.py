#!/usr/bin/env python3
"""Writes the Grafana dashboards of helm/zeroc/files/dashboards from the panels listed here. Standard library only.

    deploy/grafana/make_dashboards.py            write them
    deploy/grafana/make_dashboards.py --check    exit code 1 when a file is not what this would write

Every expression is limited to the chosen cluster: `zeroc_cluster=~"$cluster"` is what every target carries.
"""

import json
import pathlib
import re
import sys

OUT = pathlib.Path(__file__).resolve().parents[2] / "helm/zeroc/files/dashboards"
WIDTH, HEIGHT = 8, 7  # of a panel, in the 24 columns of a Grafana row


def quantile(q, name, by="", where=""):
    labels = "le" + (f", {by}" if by else "")
    return f"histogram_quantile({q}, sum by ({labels}) (rate({name}_bucket{{{where}}}[$__rate_interval])))"


def rate(name, by, where=""):
    return f"sum by ({by}) (rate({name}{{{where}}}[$__rate_interval]))"


def panel(title, unit, targets, what, kind="timeseries", stack=False, maximum=None):
    return {"title": title, "unit": unit, "targets": targets, "what": what, "kind": kind, "stack": stack,
            "max": maximum}


ROUTER = 'zeroc_role="router"'

REQUESTS = [
    ("Job completion time", [
        panel("JCT percentiles", "s", [
            (quantile(q, "zeroc_request_jct_seconds", where='outcome="ok"'), f"p{q * 100:g}")
            for q in (0.5, 0.9, 0.95, 0.99)], "Arrival at the router to the last token, requests that ended well."),
        panel("JCT p95 by profile", "s", [(quantile(0.95, "zeroc_request_jct_seconds", "profile", 'outcome="ok"'),
                                           "{{profile}}")], "Whether a profile pays: compare with bf16."),
        panel("Mean JCT by phase", "s", [
            (rate("zeroc_jct_phase_seconds_sum", "phase") + " / ignoring(phase) group_left "
             'sum(rate(zeroc_jct_phase_seconds_count{phase="decode"}[$__rate_interval]))', "{{phase}}")],
              "The phases add up to the mean JCT. A thick wire band: compress harder or widen the link.", stack=True),
        panel("Requests by outcome", "reqps", [(rate("zeroc_request_jct_seconds_count", "outcome"), "{{outcome}}")],
              "refused: no room at the router; resource_exhausted: none at decode; unavailable: a worker was lost.",
              stack=True),
        panel("Requests in flight", "short", [
            (f'sum(vllm:num_requests_running{{{ROUTER}}})', "running"),
            (f'sum(vllm:num_requests_waiting{{{ROUTER}}})', "waiting for room at decode")],
              "On all routers. The limits are max_in_flight and queue_max of each."),
        panel("Wire share of the JCT", "percentunit", [
            ('sum(rate(zeroc_jct_phase_seconds_sum{phase="wire"}[$__rate_interval])) '
             "/ sum(rate(zeroc_jct_phase_seconds_sum[$__rate_interval]))", "wire / JCT")],
              "KV that was still on its way when prefill had ended."),
    ]),
    ("Tokens", [
        panel("Time to first token", "s", [
            (quantile(q, "vllm:time_to_first_token_seconds", where=ROUTER), f"p{q * 100:g}")
            for q in (0.5, 0.95, 0.99)], "Does not wait for the wire: prefill samples the first token."),
        panel("Inter-token latency", "s", [
            (quantile(q, "vllm:inter_token_latency_seconds", where=ROUTER), f"p{q * 100:g}")
            for q in (0.5, 0.95, 0.99)], "Between tokens of one request."),
        panel("Token throughput", "short", [
            (f"sum(rate(vllm:prompt_tokens_total{{{ROUTER}}}[$__rate_interval]))", "prompt tokens/s"),
            (f"sum(rate(vllm:generation_tokens_total{{{ROUTER}}}[$__rate_interval]))", "generated tokens/s")],
              "Of all routers."),
    ]),
    ("Ends, repeats and turns", [
        panel("Answers by end", "reqps", [
            (f"sum by (finished_reason) (rate(vllm:request_success_total{{{ROUTER}}}[$__rate_interval]))",
             "{{finished_reason}}")], "stop: the model ended; length: max_tokens did.", stack=True),
        panel("Retries", "short", [("sum by (stage) (increase(zeroc_retries_total{}[$__rate_interval]))", "{{stage}}")],
              "Attempts repeated on another worker. decode: the answer goes on there, behind the last token sent."),
        panel("Preemptions", "short", [
            ("sum(increase(vllm:num_preemptions_total{}[$__rate_interval]))", "preempted"),
            ("sum(vllm:num_requests_swapped{})", "swapped out now")],
              "Decode had no blocks for a longer answer and took those of a request that ranks lower."),
    ]),
]

KV = [
    ("Ratio policy", [
        panel("Decisions by profile", "reqps", [(rate("zeroc_policy_decisions_total", "profile"), "{{profile}}")],
              "Which profiles the policy chooses.", stack=True),
        panel("Decisions by reason", "reqps", [(rate("zeroc_policy_decisions_total", "reason"), "{{reason}}")],
              "Why (docs/metrics.md).", stack=True),
        panel("Perplexity increase", "short", [("max by (kind) (zeroc_ppl_increase{})", "{{kind}}")],
              "Of the last request: allowed (budget), promised by the plan (predicted), measured (audited)."),
    ]),
    ("Keys and values", [
        panel("KV bytes per second", "Bps", [(rate("zeroc_kv_bytes_total", "stage"), "{{stage}}")],
              "raw: as bf16; packed: resident at decode; wire: sent."),
        panel("Compression ratio", "short", [
            ('sum(rate(zeroc_kv_bytes_total{stage="raw"}[$__rate_interval])) '
             '/ sum(rate(zeroc_kv_bytes_total{stage="wire"}[$__rate_interval]))', "raw / wire"),
            (quantile(0.5, "zeroc_kv_compression_ratio"), "median request")], "How many times fewer bytes than bf16."),
        panel("KV transfer", "s", [(quantile(q, "zeroc_kv_transfer_seconds"), f"p{q * 100:g}")
                                   for q in (0.5, 0.95, 0.99)], "First byte posted to last byte acknowledged."),
        panel("KV memory in use", "percentunit", [
            ("max by (zeroc_role, instance) (vllm:kv_cache_usage_perc{})", "{{zeroc_role}} {{instance}}")],
              "Of each worker.", maximum=1),
        panel("Decode blocks by state", "short", [
            ('sum by (state) (zeroc_kv_blocks{zeroc_role="decode"})', "{{state}}")],
              "quarantined: what a lost prefill worker might still write."),
        panel("Wire throughput", "Bps", [
            ('sum(rate(zeroc_kv_bytes_total{stage="wire"}[$__rate_interval]))', "sent")],
              "Compare with the link."),
    ]),
    ("Leases and failures", [
        panel("Leases expired", "short", [
            ("sum(increase(zeroc_kv_leases_expired_total{}[$__rate_interval]))", "expired")],
              "Prefill workers that hang or die."),
        panel("Checksum failures", "short", [
            ("sum(increase(zeroc_kv_checksum_failures_total{}[$__rate_interval]))", "blocks")],
              "Blocks that arrived damaged; they are refused."),
    ]),
    ("Sequence parallelism", [
        panel("SP traffic", "Bps", [(rate("zeroc_sp_bytes_total", "scheme"), "{{scheme}}")],
              "What the ranks of prefill groups send to each other."),
    ]),
    ("Prefix cache", [
        panel("Prompt tokens found", "percentunit", [
            ("sum by (zeroc_role) (rate(vllm:prefix_cache_hits_total{}[$__rate_interval])) "
             "/ sum by (zeroc_role) (rate(vllm:prefix_cache_queries_total{}[$__rate_interval]))", "{{zeroc_role}}")],
              "Of those looked up. prefill: not computed; decode: not received.", maximum=1),
        panel("Prompt tokens saved", "short", [
            ("sum by (zeroc_role) (rate(vllm:prefix_cache_hits_total{}[$__rate_interval]))", "{{zeroc_role}}"),
            (rate("zeroc_policy_prefix_tokens_total", "role"), "{{role}}, expected by the router")],
              "Tokens/s that a worker had already, and those that the choice of workers counted on."),
        panel("Prefix cache", "bytes", [("zeroc_prefix_cache_bytes{}", "{{zeroc_role}} {{instance}}")],
              "Blocks that the cache holds; they count as free."),
    ]),
]

WORKERS = [
    ("Cluster", [
        panel("Workers", "short", [("min by (role) (zeroc_workers{})", "{{role}}")],
              "Registered and healthy, as the router that knows fewest sees it."),
        panel("Routers registered with", "short", [
            ("zeroc_routers_registered{}", "{{zeroc_role}} {{instance}}")], "0: the worker gets no work."),
        panel("Targets up", "short", [('sum by (zeroc_role) (up{zeroc_role!=""})', "{{zeroc_role}}")],
              "Services that answer scrapes."),
    ]),
    ("Load of each worker", [
        panel("Prefill backlog", "short", [("zeroc_prefill_backlog_tokens{}", "{{instance}}")],
              "Prompt tokens queued and in work: what scales the prefill groups."),
        panel("Prefill requests", "short", [
            ('vllm:num_requests_running{zeroc_role="prefill"}', "running {{instance}}"),
            ('vllm:num_requests_waiting{zeroc_role="prefill"}', "waiting {{instance}}")], "Of each prefill worker."),
        panel("Decode requests", "short", [
            ('vllm:num_requests_running{zeroc_role="decode"}', "running {{instance}}"),
            ('vllm:num_requests_waiting{zeroc_role="decode"}', "waiting {{instance}}")], "Of each decode worker."),
        panel("Decode KV memory", "percentunit", [
            ('vllm:kv_cache_usage_perc{zeroc_role="decode"}', "{{instance}}")],
              "What scales decode.", maximum=1),
        panel("Tokens of one step", "short", [
            ("sum by (zeroc_role, instance) (rate(vllm:iteration_tokens_total_sum[$__rate_interval])) "
             "/ sum by (zeroc_role, instance) (rate(vllm:iteration_tokens_total_count[$__rate_interval]))",
             "{{zeroc_role}} {{instance}}")], "Mean: the chunk of prefill; the batch of decode."),
        panel("What runs", "short", [("zeroc_runtime_info{}", "")],
              "Chosen at start: backend, ISA, transport, plan. Nothing falls back in silence.", kind="table"),
    ]),
]

DASHBOARDS = {"zeroc-requests": ("ZeroC / Requests", REQUESTS), "zeroc-kv": ("ZeroC / Policy and KV", KV),
              "zeroc-workers": ("ZeroC / Workers", WORKERS)}

SELECTOR = re.compile(r'((?:zeroc_[a-z_]+|vllm:[a-z_]+|\bup))\{([^}]*)\}'
                      r'|((?:(?:zeroc_|vllm:)[a-z_]+_(?:sum|count))(?=\[))')


def in_cluster(expr):
    """Limits every selector of the expression to the chosen cluster."""
    def limit(match):
        name, labels = (match.group(1), match.group(2)) if match.group(1) else (match.group(3), "")
        return f'{name}{{zeroc_cluster=~"$cluster"{"," if labels else ""}{labels}}}'

    return SELECTOR.sub(limit, expr)


def make_panel(number, spec, x, y):
    source = {"type": "prometheus", "uid": "${datasource}"}
    targets = [{"refId": chr(ord("A") + i), "datasource": source, "expr": in_cluster(expr), "legendFormat": legend,
                **({"format": "table", "instant": True} if spec["kind"] == "table" else {})}
               for i, (expr, legend) in enumerate(spec["targets"])]
    custom = {"fillOpacity": 20 if spec["stack"] else 5, "showPoints": "never",
              "stacking": {"mode": "normal" if spec["stack"] else "none"}}
    defaults = {"unit": spec["unit"], "min": 0, "custom": custom}
    if spec["max"] is not None:
        defaults["max"] = spec["max"]
    return {"id": number, "type": spec["kind"], "title": spec["title"], "description": spec["what"],
            "datasource": source,
            "gridPos": {"x": x, "y": y, "w": WIDTH * (2 if spec["kind"] == "table" else 1), "h": HEIGHT},
            "fieldConfig": {"defaults": defaults if spec["kind"] != "table" else {}, "overrides": []},
            "targets": targets}


def make(uid, title, rows):
    panels, y, number = [], 0, 1
    for name, specs in rows:
        panels.append({"id": number, "type": "row", "title": name, "collapsed": False, "panels": [],
                       "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}})
        number += 1
        y += 1
        for i, spec in enumerate(specs):
            panels.append(make_panel(number, spec, (i % 3) * WIDTH, y + i // 3 * HEIGHT))
            number += 1
        y += (len(specs) + 2) // 3 * HEIGHT
    variables = [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"},
        {"name": "cluster", "type": "query", "label": "Cluster", "includeAll": True, "multi": True, "allValue": ".*",
         "datasource": {"type": "prometheus", "uid": "${datasource}"}, "refresh": 2,
         "query": "label_values(zeroc_runtime_info, zeroc_cluster)", "current": {"text": "All", "value": "$__all"}}]
    return {"uid": uid, "title": title, "tags": ["zeroc"], "schemaVersion": 38, "version": 1, "editable": True,
            "time": {"from": "now-1h", "to": "now"}, "refresh": "10s", "templating": {"list": variables},
            "panels": panels}


def main():
    check = sys.argv[1:] == ["--check"]
    if sys.argv[1:] and not check:
        sys.exit(__doc__)
    stale = []
    for uid, (title, rows) in DASHBOARDS.items():
        path = OUT / f"{uid}.json"
        text = json.dumps(make(uid, title, rows), indent=1) + "\n"
        if not check:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            stale.append(path.name)
    if stale:
        sys.exit(f"not what {pathlib.Path(__file__).name} writes: {', '.join(stale)}; run it")


if __name__ == "__main__":
    main()
