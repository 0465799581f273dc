{{/* Pods: what head, workers, submitter and autoscaler are made of, each within `restricted`. Values are laid over them in
     _overlay.tpl. */}}

{{- define "stage-ray.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: {{ .Values.podSecurity.runAsUser | int64 }}
runAsGroup: {{ .Values.podSecurity.runAsGroup | int64 }}
fsGroup: {{ .Values.podSecurity.fsGroup | int64 }}
fsGroupChangePolicy: OnRootMismatch
{{- with .Values.podSecurity.supplementalGroups }}
supplementalGroups:
  {{- range . }}
  - {{ int64 . }}
  {{- end }}
{{- end }}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "stage-ray.containerSecurityContext" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
{{- end }}

{{- define "stage-ray.container" -}}
image: {{ include "stage-ray.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy | quote }}
securityContext:
  {{- include "stage-ray.containerSecurityContext" . | nindent 2 }}
{{- end }}

{{/* What all pods say of themselves. */}}
{{- define "stage-ray.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  {{- include "stage-ray.podSecurityContext" . | nindent 2 }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Where a pod may run, as JSON. Argument: head or a group. */}}
{{- define "stage-ray.scheduling" -}}
{{- $place := dict -}}
{{- range $key := list "nodeSelector" "tolerations" "affinity" "runtimeClassName" "priorityClassName" -}}
{{- with get $ $key -}}{{- $_ := set $place $key . -}}{{- end -}}
{{- end -}}
{{- toJson $place -}}
{{- end }}

{{/* Environment of every container. A user whom the image's passwd file does not know has / for a home and no name:
     caches of vLLM, Triton and PyTorch need both. Where NVIDIA's runtime is the default one, a container sees every GPU
     of its node unless it is told otherwise; to those that ask for GPUs the device plugin says which.
     Arguments: home, gpus (how many it asks for). */}}
{{- define "stage-ray.baseEnv" -}}
- name: HOME
  value: {{ .home | quote }}
- name: USER
  value: stage-ray
{{- if not .gpus }}
- name: NVIDIA_VISIBLE_DEVICES
  value: void
{{- end }}
{{- end }}

{{/* Environment of head and workers. Arguments: root, part (head or a group), head (true or false). By the time Ray
     hears of the end on the head the driver has left (preStop), so there is nothing to wait for. */}}
{{- define "stage-ray.env" -}}
{{ include "stage-ray.baseEnv" (dict "home" "/home/stage-ray" "gpus" .part.gpus) }}
- name: RAY_ENABLE_UV_RUN_RUNTIME_ENV
  value: "0"
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
- name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
  value: {{ .head | ternary 5 (int64 .root.Values.drainSeconds) | quote }}
- name: RAY_JOB_STOP_WAIT_TIME_S  # a job that is stopped finishes its step and saves
  value: {{ .root.Values.drainSeconds | int64 | quote }}
- name: HF_HOME
  value: {{ include "stage-ray.hfCachePath" .root | quote }}
{{- with .root.Values.huggingFace }}
{{- if .existingSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ .existingSecret | quote }}, key: {{ .key | quote }}}
{{- end }}
{{- if .offline }}
- name: HF_HUB_OFFLINE
  value: "1"
{{- end }}
{{- end }}
{{- end }}

{{/* A pod of Ray as the chart makes it, before values are laid over it. Arguments: root, part (head or a group), name (of
     the container), head (true or false). */}}
{{- define "stage-ray.ownPod" -}}
{{- $root := .root -}}
{{- $storage := $root.Values.storage -}}
{{- $size := dict "cpu" (toString .part.cpu) "memory" .part.memory -}}
{{- if .part.gpus }}
{{- $_ := set $size (.part.gpuResource | default "nvidia.com/gpu") (toString .part.gpus) -}}
{{- end -}}
{{- $requests := $size -}}
{{- if not $storage.hfCache.enabled -}}
{{- $requests = merge (dict "ephemeral-storage" $storage.hfCache.size) $size -}}
{{- end -}}
{{ include "stage-ray.pod" $root }}
{{- if not (and .head $root.Values.autoscaling.enabled) }}
serviceAccountName: {{ include "stage-ray.serviceAccount" $root | quote }}
{{- end }}
terminationGracePeriodSeconds: {{ $root.Values.terminationGracePeriodSeconds | int64 }}
{{- if and .head (eq $root.Values.mode "job") (not $root.Values.job.entrypoint) }}
initContainers:
  {{- include "stage-ray.volumeCheck" $root | nindent 2 }}
{{- end }}
containers:
  - name: {{ .name | quote }}
    {{- include "stage-ray.container" $root | nindent 4 }}
    resources:
      limits:
        {{- toYaml $size | nindent 8 }}
      requests:
        {{- toYaml $requests | nindent 8 }}
    env:
      {{- include "stage-ray.env" . | nindent 6 }}
    {{- with $root.Values.secretEnv.existingSecret }}
    envFrom:
      - secretRef:
          name: {{ . | quote }}
    {{- end }}
    ports:
      {{- if .head }}
      {{- include "stage-ray.headPorts" $root | nindent 6 }}
      {{- else }}
      - {name: metrics, containerPort: 8080}
      {{- end }}
    {{- if .head }}
    lifecycle:
      preStop:
        exec:
          command: [python, /etc/stage-ray/stop_driver.py, {{ $root.Values.drainSeconds | int64 | quote }}]
    {{- end }}
    volumeMounts:
      - {name: dev-shm, mountPath: /dev/shm}
      - {name: config, mountPath: /etc/stage-ray, readOnly: true}
      - {name: home, mountPath: /home/stage-ray}
      {{- include "stage-ray.claimMounts" $root | nindent 6 }}
volumes:
  - name: dev-shm
    emptyDir: {medium: Memory, sizeLimit: {{ .part.shm | quote }}}
  - name: config
    configMap:
      name: {{ printf "%s-config" (include "stage-ray.name" $root) | quote }}
  - name: home
    emptyDir: {}
  - name: checkpoints
    persistentVolumeClaim:
      claimName: {{ include "stage-ray.checkpointClaim" $root | quote }}
  - name: hf-cache
    {{- if $storage.hfCache.enabled }}
    persistentVolumeClaim:
      claimName: {{ include "stage-ray.hfCacheClaim" $root | quote }}
      {{- if and (has "ReadOnlyMany" $storage.hfCache.accessModes) (not (has "ReadWriteMany" $storage.hfCache.accessModes)) }}
      readOnly: true
      {{- end }}
    {{- else }}
    emptyDir: {sizeLimit: {{ $storage.hfCache.size | quote }}}
    {{- end }}
  {{- if and .head $root.Values.autoscaling.enabled }}
  {{- include "stage-ray.autoscalerToken" $root | nindent 2 }}
  {{- end }}
{{- end }}

{{/* Where a container mounts the two claims. */}}
{{- define "stage-ray.claimMounts" -}}
{{- with .Values.storage -}}
- name: checkpoints
  mountPath: {{ include "stage-ray.checkpointPath" $ | quote }}
  {{- with .checkpoints.subPath }}
  subPath: {{ . | quote }}
  {{- end }}
- name: hf-cache
  mountPath: {{ include "stage-ray.hfCachePath" $ | quote }}
  {{- with .hfCache.subPath }}
  subPath: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Ends with a sentence where the run could not write, before Ray starts. With an entrypoint of your own, and for jobs
     from outside, the chart does not know where that is. */}}
{{- define "stage-ray.volumeCheck" -}}
{{- $size := dict "cpu" "500m" "memory" "256Mi" -}}
- name: check-volumes
  {{- include "stage-ray.container" . | nindent 2 }}
  command:
    - python
    - /etc/stage-ray/check_volumes.py
    - {{ printf "storage.checkpoints=%s" (include "stage-ray.runDir" .) | quote }}
    {{- if and .Values.storage.hfCache.enabled (not .Values.storage.hfCache.existingClaim) }}
    - {{ printf "storage.hfCache=%s" (include "stage-ray.hfCachePath" .) | quote }}
    {{- end }}
  terminationMessagePolicy: FallbackToLogsOnError
  resources:
    limits:
      {{- toYaml $size | nindent 6 }}
    requests:
      {{- toYaml $size | nindent 6 }}
  env:
    {{- include "stage-ray.baseEnv" (dict "home" "/tmp") | nindent 4 }}
  volumeMounts:
    - {name: config, mountPath: /etc/stage-ray, readOnly: true}
    {{- include "stage-ray.claimMounts" . | nindent 4 }}
{{- end }}

{{/* The operator makes the head's Service of these, so the standard ones must be among them. */}}
{{- define "stage-ray.headPorts" -}}
- {name: gcs-server, containerPort: 6379}
- {name: dashboard, containerPort: 8265}
- {name: metrics, containerPort: 8080}
- {name: as-metrics, containerPort: 44217}
- {name: dash-metrics, containerPort: 44227}
{{- with include "stage-ray.runMetricsPort" . }}
- {name: run-metrics, containerPort: {{ . }}}
{{- end }}
{{- end }}

{{/* Port of the driver's own metrics; empty where the config leaves it to chance or has none. */}}
{{- define "stage-ray.runMetricsPort" -}}
{{- $config := include "stage-ray.config" . | fromYaml -}}
{{- with dig "cluster" "metrics_port" 0 $config }}{{ int64 . }}{{ end }}
{{- end }}

{{/* The token of the operator's service account, for the autoscaler's container and no other of the head's pod. */}}
{{- define "stage-ray.autoscalerToken" -}}
- name: autoscaler-token
  projected:
    sources:
      - serviceAccountToken: {path: token, expirationSeconds: 3607}
      - configMap:
          name: kube-root-ca.crt
          items:
            - {key: ca.crt, path: ca.crt}
      - downwardAPI:
          items:
            - path: namespace
              fieldRef: {fieldPath: metadata.namespace}
{{- end }}

{{/* Labels and annotations of a pod. Arguments: root, part, role. */}}
{{- define "stage-ray.podMetadata" -}}
{{- $own := include "stage-ray.selector" .root | fromYaml -}}
{{- $_ := set $own "app.kubernetes.io/component" .role -}}
{{- $sum := dict "checksum/config" (include "stage-ray.config" .root | sha256sum) -}}
labels:
  {{- include "stage-ray.overlay" (dict "maps" (list .root.Values.labels (.part.labels | default dict) $own)) | fromJson | toYaml | nindent 2 }}
annotations:
  {{- include "stage-ray.overlay" (dict "maps" (list .root.Values.annotations (.part.annotations | default dict) $sum)) | fromJson | toYaml | nindent 2 }}
{{- end }}

{{/* Follows the job's log, holds no data: not the head's environment, no volume. */}}
{{- define "stage-ray.ownSubmitter" -}}
{{- $size := dict "cpu" (toString .Values.job.submitter.cpu) "memory" .Values.job.submitter.memory -}}
restartPolicy: Never
{{ include "stage-ray.pod" . }}
serviceAccountName: {{ include "stage-ray.serviceAccount" . | quote }}
containers:
  - name: ray-job-submitter
    {{- include "stage-ray.container" . | nindent 4 }}
    resources:
      limits:
        {{- toYaml $size | nindent 8 }}
      requests:
        {{- toYaml $size | nindent 8 }}
    env:
      {{- include "stage-ray.baseEnv" (dict "home" "/tmp") | nindent 6 }}
{{- end }}
