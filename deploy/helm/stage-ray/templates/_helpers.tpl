{{/* Names, labels and small pieces. Pods are in _pods.tpl, what must not be in _rules.tpl. */}}

{{- define "stage-ray.name" -}}
{{ .Values.fullnameOverride | default .Release.Name }}
{{- end }}

{{/* What a policy or a monitor selects by: every pod of the release has these. */}}
{{- define "stage-ray.selector" -}}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/part-of: stage-ray
{{- end }}

{{- define "stage-ray.ownLabels" -}}
{{ include "stage-ray.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | quote }}
{{- end }}

{{/* Labels of an object, by those that its own values have. Argument: root and these, in a list. */}}
{{- define "stage-ray.labelsWith" -}}
{{- $root := first . -}}
{{- $own := include "stage-ray.ownLabels" $root | fromYaml -}}
{{- include "stage-ray.overlay" (dict "maps" (list $root.Values.labels (last .) $own)) | fromJson | toYaml -}}
{{- end }}

{{- define "stage-ray.labels" -}}
{{ include "stage-ray.labelsWith" (list . (dict)) }}
{{- end }}

{{/* Of the RayJob or RayCluster itself: Kueue and batch schedulers look there, and KubeRay hands on what pods need. */}}
{{- define "stage-ray.rayMetadata" -}}
name: {{ include "stage-ray.name" . | quote }}
namespace: {{ .Release.Namespace | quote }}
labels:
  {{- include "stage-ray.labelsWith" (list . (include "stage-ray.queueLabels" . | fromYaml)) | nindent 2 }}
{{- with .Values.annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "stage-ray.queueLabels" -}}
{{- with .Values.kueue.queueName }}
kueue.x-k8s.io/queue-name: {{ . | quote }}
{{- end }}
{{- with .Values.kueue.priorityClass }}
kueue.x-k8s.io/priority-class: {{ . | quote }}
{{- end }}
{{- end }}

{{- define "stage-ray.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag }}{{ end }}
{{- end }}
{{- end }}

{{- define "stage-ray.serviceAccount" -}}
{{- with .Values.serviceAccount -}}
{{ .name | default (ternary (include "stage-ray.name" $) "default" .create) }}
{{- end }}
{{- end }}

{{- define "stage-ray.checkpointClaim" -}}
{{ .Values.storage.checkpoints.existingClaim | default (printf "%s-checkpoints" (include "stage-ray.name" .)) }}
{{- end }}

{{- define "stage-ray.hfCacheClaim" -}}
{{ .Values.storage.hfCache.existingClaim | default (printf "%s-hf-cache" (include "stage-ray.name" .)) }}
{{- end }}

{{/* The run's config as YAML text. */}}
{{- define "stage-ray.config" -}}
{{ .Values.configFile | default (toYaml .Values.config) }}
{{- end }}

{{/* Where volumes are mounted, without what /a//b/ and /a/b have apart. */}}
{{- define "stage-ray.checkpointPath" -}}
{{ clean .Values.storage.checkpoints.mountPath }}
{{- end }}

{{- define "stage-ray.hfCachePath" -}}
{{ clean .Values.storage.hfCache.mountPath }}
{{- end }}

{{- define "stage-ray.runDir" -}}
{{ include "stage-ray.checkpointPath" . }}/runs/{{ include "stage-ray.name" . }}
{{- end }}

{{- define "stage-ray.entrypoint" -}}
{{- $run := include "stage-ray.runDir" . -}}
{{ .Values.job.entrypoint | default (printf "stage-ray train /etc/stage-ray/config.yaml --run-dir %s --auto-resume" $run) }}
{{- end }}

{{/* Bytes of a quantity such as 16Gi; the schema admits whole numbers only. */}}
{{- define "stage-ray.bytes" -}}
{{- $units := dict "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- $number := regexFind "^[0-9]+" . -}}
{{- $unit := trimPrefix $number . -}}
{{- if $unit }}{{ mul (int64 $number) (int64 (get $units $unit)) }}{{ else }}{{ $number }}{{ end }}
{{- end }}
