{{- /*
The configuration file of a role: what the chart knows, then the user's settings over it; `null` drops one.
(dict "root" . "role" "decode" "values" .Values.decode "follower" false); a follower of a prefill group has no router.
*/ -}}
{{- define "zeroc.config" -}}
{{- $v := .root.Values -}}
{{- $config := dict
  "model" $v.model.path
  "grpc_listen" "0.0.0.0:9000"
  "http_listen" "0.0.0.0:8000"
-}}
{{- if $v.model.plan }}{{- $_ := set $config "plan" $v.model.plan }}{{- end }}
{{- if eq .role "router" }}
  {{- $_ := set $config "served_model_name" $v.model.name }}
  {{- if $v.apiKeys.secretName }}{{- $_ := set $config "api_keys_file" "/etc/zeroc/keys/api-keys" }}{{- end }}
{{- else }}
  {{- if not .follower }}{{- $_ := set $config "router" (printf "%s.:9000" (include "zeroc.routerHost" .root)) }}{{- end }}
  {{- $_ := set $config "transport_tls" $v.transport.tls }}
  {{- $_ := set $config "transport_net_devices" $v.transport.netDevices }}
{{- end }}
{{- if $v.tls.enabled }}
  {{- $_ := set $config "tls_certificate_file" "/etc/zeroc/tls/tls.crt" }}
  {{- $_ := set $config "tls_key_file" "/etc/zeroc/tls/tls.key" }}
  {{- $_ := set $config "tls_ca_file" "/etc/zeroc/tls/ca.crt" }}
  {{- if $v.tls.mutual }}{{- $_ := set $config "grpc_client_ca_file" "/etc/zeroc/tls/ca.crt" }}{{- end }}
  {{- if $v.tls.clusterKeySecretName }}{{- $_ := set $config "cluster_key_file" "/etc/zeroc/cluster/cluster.key" }}{{- end }}
{{- end }}
{{- range $key, $value := .values.config }}
  {{- if kindIs "invalid" $value }}{{- $_ := unset $config $key }}{{- else }}{{- $_ := set $config $key $value }}{{- end }}
{{- end }}
{{- range $key, $value := $config }}
{{ $key }}: {{ if kindIs "string" $value }}{{ $value | quote }}{{ else if kindIs "float64" $value }}{{ include "zeroc.number" $value }}{{ else }}{{ $value }}{{ end }}
{{- end }}
{{- end -}}

{{- /* YAML numbers become floats on their way; the programs want 300000, not 3e+05. */ -}}
{{- define "zeroc.number" -}}
{{- if eq (floor .) . }}{{ int64 . }}{{- else }}{{ . }}{{- end -}}
{{- end -}}

{{- /* Seconds from SIGTERM to SIGKILL: the whole drain, and the slack. */ -}}
{{- define "zeroc.graceSeconds" -}}
{{- $config := .values.config -}}
{{- $ms := add (int64 (default 0 $config.drain_delay_ms)) (int64 (default (ternary 30000 10000 (eq .role "router")) $config.drain_timeout_ms)) -}}
{{- add (div (add $ms 999) 1000) (int64 .root.Values.terminationSlackSeconds) -}}
{{- end -}}
