{{- /*
The pod template of a role: (dict "root" . "role" "decode" "values" .Values.decode "config" NAME "subdomain" NAME
"extraLabels" (dict) "file" "decode" "followers" (list)); the subdomain is that of the pods' names, the file (default: the
role) that of the configuration, the followers are the other pods of a leader's prefill group.
*/ -}}
{{- define "zeroc.podTemplate" -}}
{{- $root := .root -}}
{{- $v := .root.Values -}}
{{- $values := .values -}}
{{- $worker := ne .role "router" -}}
metadata:
  labels:
    {{- include "zeroc.selector" . | nindent 4 }}
    {{- with .extraLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- with $values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    checksum/config: {{ include "zeroc.config" . | sha256sum }}
    {{- with $values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "zeroc.serviceAccountName" $root }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ include "zeroc.graceSeconds" . }}
  securityContext:
    {{- toYaml $v.podSecurityContext | nindent 4 }}
  {{- with $v.image.pullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if or $values.spread $values.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- if $values.spread }}
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "zeroc.selector" . | nindent 10 }}
    {{- end }}
    {{- with $values.topologySpreadConstraints }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
  {{- if eq $v.model.source "init" }}
  initContainers:
    - name: model
      image: {{ required "model.init.image is missing: the image that fetches the model" $v.model.init.image }}
      {{- with $v.model.init.command }}
      command:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $v.model.init.args }}
      args:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $v.model.init.env }}
      env:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $v.model.init.envFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      securityContext:
        {{- include "zeroc.containerSecurityContext" (dict "capabilities" (list)) | nindent 8 }}
      volumeMounts:
        - {name: model, mountPath: {{ $v.model.mountPath }}}
        - {name: tmp, mountPath: /tmp}
  {{- end }}
  containers:
    - name: {{ .role }}
      image: {{ include "zeroc.image" . }}
      imagePullPolicy: {{ $v.image.pullPolicy }}
      args:
        - --config=/etc/zeroc/config/{{ default .role .file }}.yaml
        {{- if $worker }}
        - --name=$(POD_NAME)
        - --advertise=$(ADVERTISE)
        {{- end }}
        {{- with .followers }}
        - --sp-followers={{ join "," . }}
        {{- end }}
        {{- with $values.extraArgs }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- $env := concat (ternary $v.transport.env (list) $worker) $values.env }}
      {{- if or $worker $env }}
      env:
        {{- if $worker }}
        - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        {{- if $v.tls.enabled }}
        - {name: ADVERTISE, value: "$(POD_NAME).{{ .subdomain }}.{{ $root.Release.Namespace }}.svc.{{ $v.clusterDomain }}"}
        {{- else }}
        - {name: ADVERTISE, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        {{- end }}
        - {name: UCX_TCP_PORT_RANGE, value: "{{ int $v.transport.tcpPorts.first }}-{{ int $v.transport.tcpPorts.last }}"}
        {{- end }}
        {{- with $env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- end }}
      ports:
        - {name: http, containerPort: 8000}
        - {name: grpc, containerPort: 9000}
      {{- include "zeroc.probes" . | nindent 6 }}
      resources:
        {{- include "zeroc.resources" . | nindent 8 }}
      securityContext:
        {{- $capabilities := $values.capabilities }}
        {{- if and $worker $v.rdma.enabled $v.rdma.ipcLock }}{{- $capabilities = append $capabilities "IPC_LOCK" }}{{- end }}
        {{- include "zeroc.containerSecurityContext" (dict "capabilities" $capabilities) | nindent 8 }}
      volumeMounts:
        - {name: config, mountPath: /etc/zeroc/config, readOnly: true}
        - {name: tmp, mountPath: /tmp}
        {{- if $worker }}
        - {name: shm, mountPath: /dev/shm}
        {{- end }}
        {{- include "zeroc.modelMount" $root | nindent 8 }}
        {{- if $v.tls.enabled }}
        - {name: tls, mountPath: /etc/zeroc/tls, readOnly: true}
        {{- if $v.tls.clusterKeySecretName }}
        - {name: cluster-key, mountPath: /etc/zeroc/cluster, readOnly: true}
        {{- end }}
        {{- end }}
        {{- if and (not $worker) $v.apiKeys.secretName }}
        - {name: api-keys, mountPath: /etc/zeroc/keys, readOnly: true}
        {{- end }}
        {{- with $values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: config
      configMap:
        name: {{ .config }}
    - name: tmp
      emptyDir: {}
    {{- if $worker }}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ $values.shmSize }}
    {{- end }}
    {{- include "zeroc.modelVolume" $root | nindent 4 }}
    {{- if $v.tls.enabled }}
    - name: tls
      secret:
        secretName: {{ required "tls.secretName is missing" $v.tls.secretName }}
        defaultMode: 0440
    {{- if $v.tls.clusterKeySecretName }}
    - name: cluster-key
      secret:
        secretName: {{ $v.tls.clusterKeySecretName }}
        defaultMode: 0440
    {{- end }}
    {{- end }}
    {{- if and (not $worker) $v.apiKeys.secretName }}
    - name: api-keys
      secret:
        secretName: {{ $v.apiKeys.secretName }}
        defaultMode: 0440
    {{- end }}
    {{- with $values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{- define "zeroc.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
  {{- with .capabilities }}
  add:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}

{{- /* Device resources count as requests and as limits. */ -}}
{{- define "zeroc.resources" -}}
{{- $v := .root.Values -}}
{{- $resources := deepCopy .values.resources -}}
{{- if ne .role "router" }}
  {{- range list $v.gpu $v.rdma }}
    {{- if .enabled }}
      {{- $requests := default (dict) $resources.requests }}
      {{- $limits := default (dict) $resources.limits }}
      {{- $_ := set $requests .resource (int .count) }}
      {{- $_ := set $limits .resource (int .count) }}
      {{- $_ := set $resources "requests" $requests }}
      {{- $_ := set $resources "limits" $limits }}
    {{- end }}
  {{- end }}
{{- end }}
{{- toYaml $resources }}
{{- end -}}

{{- /*
/readyz: the router has the workers it needs; a worker is registered with a router; neither drains. /healthz: alive.
A kubelet has no client certificate, but only gRPC asks for one.
*/ -}}
{{- define "zeroc.probes" -}}
{{- $p := .root.Values.probes -}}
{{- $scheme := ternary "HTTPS" "HTTP" .root.Values.tls.enabled -}}
startupProbe:
  httpGet: {path: /healthz, port: http, scheme: {{ $scheme }}}
  periodSeconds: {{ int $p.periodSeconds }}
  failureThreshold: {{ div (add (int $p.startupSeconds) (int $p.periodSeconds) -1) (int $p.periodSeconds) }}
livenessProbe:
  httpGet: {path: /healthz, port: http, scheme: {{ $scheme }}}
  periodSeconds: {{ int $p.periodSeconds }}
  timeoutSeconds: 5
  failureThreshold: {{ int $p.livenessFailures }}
readinessProbe:
  httpGet: {path: /readyz, port: http, scheme: {{ $scheme }}}
  periodSeconds: {{ int $p.periodSeconds }}
  timeoutSeconds: 5
  failureThreshold: 2
{{- end -}}

{{- define "zeroc.modelMount" -}}
{{- $m := .Values.model -}}
{{- if ne $m.source "image" }}
- {name: model, mountPath: {{ $m.mountPath }}, readOnly: true{{ if and (eq $m.source "pvc") $m.pvc.subPath }}, subPath: {{ $m.pvc.subPath | quote }}{{ end }}}
{{- end }}
{{- end -}}

{{- define "zeroc.modelVolume" -}}
{{- $m := .Values.model -}}
{{- if eq $m.source "pvc" }}
- name: model
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-model" (include "zeroc.fullname" .)) $m.pvc.claimName }}
{{- else if eq $m.source "init" }}
- name: model
  emptyDir: {{ if $m.init.sizeLimit }}{sizeLimit: {{ $m.init.sizeLimit }}}{{ else }}{}{{ end }}
{{- end }}
{{- end -}}
