{{/* The Ray cluster, the same in a RayJob and a RayCluster. */}}

{{- define "stage-ray.clusterSpec" -}}
{{- $root := . -}}
rayVersion: {{ .Values.rayVersion | quote }}
authOptions:
  mode: {{ .Values.auth.mode | quote }}
  {{- with .Values.auth.existingSecret }}
  secretName: {{ . | quote }}
  {{- end }}
enableInTreeAutoscaling: {{ .Values.autoscaling.enabled }}
{{- with .Values.autoscaling }}
{{- if .enabled }}
autoscalerOptions:
  version: {{ .version | quote }}
  idleTimeoutSeconds: {{ .idleTimeoutSeconds | int64 }}
  upscalingMode: {{ .upscalingMode | quote }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy | quote }}
  {{- $size := dict "cpu" (toString .resources.cpu) "memory" .resources.memory }}
  resources:
    limits:
      {{- toYaml $size | nindent 6 }}
    requests:
      {{- toYaml $size | nindent 6 }}
  securityContext:
    {{- include "stage-ray.containerSecurityContext" $root | nindent 4 }}
  env:
    {{- include "stage-ray.baseEnv" (dict "home" "/tmp") | nindent 4 }}
  volumeMounts:
    - {name: autoscaler-token, mountPath: /var/run/secrets/kubernetes.io/serviceaccount, readOnly: true}
{{- end }}
{{- end }}
headGroupSpec:
  serviceType: ClusterIP
  rayStartParams:
    {{- with .Values.head.rayStartParams }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    num-cpus: "0"
    num-gpus: "0"
    object-store-memory: {{ include "stage-ray.bytes" .Values.head.objectStore | quote }}
  template:
    metadata:
      {{- include "stage-ray.podMetadata" (dict "root" . "part" .Values.head "role" "head") | nindent 6 }}
    spec:
      {{- include "stage-ray.rayPod" (dict "root" . "part" .Values.head "name" "ray-head" "head" true) | fromJson | toYaml | nindent 6 }}
workerGroupSpecs:
  {{- range $name, $group := .Values.groups }}
  {{- if $group }}
  {{- $replicas := $group.replicas | int64 }}
  - groupName: {{ $name | quote }}
    replicas: {{ $replicas }}
    minReplicas: {{ hasKey $group "minReplicas" | ternary $group.minReplicas $replicas | int64 }}
    maxReplicas: {{ hasKey $group "maxReplicas" | ternary $group.maxReplicas $replicas | int64 }}
    {{- if hasKey $group "priority" }}
    priority: {{ $group.priority | int64 }}
    {{- end }}
    {{- if hasKey $group "idleTimeoutSeconds" }}
    idleTimeoutSeconds: {{ $group.idleTimeoutSeconds | int64 }}
    {{- end }}
    {{- with include "stage-ray.rayResources" $group }}
    resources:
      {{- . | nindent 6 }}
    {{- end }}
    {{- with $group.rayLabels }}
    labels:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    rayStartParams:
      {{- with $group.rayStartParams }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
      object-store-memory: {{ include "stage-ray.bytes" $group.objectStore | quote }}
    template:
      metadata:
        {{- include "stage-ray.podMetadata" (dict "root" $root "part" $group "role" $name) | nindent 8 }}
      spec:
        {{- include "stage-ray.rayPod" (dict "root" $root "part" $group "name" "ray-worker" "head" false) | fromJson | toYaml | nindent 8 }}
  {{- end }}
  {{- end }}
{{- end }}

{{/* What Ray counts on a pod beside its CPUs, memory and GPUs. GPU: "0" where there are none: Ray would otherwise look for
     them itself. Argument: a group. */}}
{{- define "stage-ray.rayResources" -}}
{{- $counts := dict -}}
{{- if not .gpus -}}
{{- $_ := set $counts "GPU" "0" -}}
{{- end -}}
{{- range $key, $count := .rayResources -}}
{{- $_ := set $counts $key (int64 $count | toString) -}}
{{- end -}}
{{- if $counts }}{{ toYaml $counts }}{{ end }}
{{- end }}
