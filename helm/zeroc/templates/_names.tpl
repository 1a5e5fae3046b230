{{- define "zeroc.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "zeroc.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "zeroc.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- /* The selectors of one role: (dict "root" . "role" "decode"). Never change them: a StatefulSet's are immutable. */ -}}
{{- define "zeroc.selector" -}}
app.kubernetes.io/name: zeroc
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .role }}
{{- end -}}

{{- define "zeroc.labels" -}}
{{ include "zeroc.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | quote }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* The image of a role. */ -}}
{{- define "zeroc.image" -}}
{{- $image := .root.Values.image -}}
{{- $name := printf "%s-%s:%s" $image.repositoryPrefix .role (default .root.Chart.AppVersion $image.tag) -}}
{{- if $image.registry -}}{{ printf "%s/%s" $image.registry $name }}{{- else -}}{{ $name }}{{- end -}}
{{- end -}}

{{- /* Where the workers find the routers: all addresses of this name, ready or not. */ -}}
{{- define "zeroc.routerHost" -}}
{{- printf "%s-routers.%s.svc.%s" (include "zeroc.fullname" .) .Release.Namespace .Values.clusterDomain -}}
{{- end -}}

{{- /* The value of the metric label zeroc_cluster, which the dashboards and rules group by. */ -}}
{{- define "zeroc.cluster" -}}
{{- printf "%s/%s" .Release.Namespace (include "zeroc.fullname" .) -}}
{{- end -}}
