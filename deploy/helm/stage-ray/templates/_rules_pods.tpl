{{/* Groups and pods: sizes that contradict each other, and what Ray, the operator or this chart sets itself. */}}

{{- define "stage-ray.rules.groups" -}}
{{- $count := 0 -}}
{{- range $name, $group := .Values.groups -}}
{{- if $group -}}
{{- $count = add1 $count -}}
{{- range $key := list "replicas" "cpu" "memory" "shm" "objectStore" -}}
{{- if not (hasKey $group $key) -}}
{{- fail (printf "groups.%s.%s is missing: every group says its replicas, cpu, memory, shm and objectStore" $name $key) -}}
{{- end -}}
{{- end -}}
{{- $replicas := int64 $group.replicas -}}
{{- $least := hasKey $group "minReplicas" | ternary $group.minReplicas $replicas | int64 -}}
{{- $most := hasKey $group "maxReplicas" | ternary $group.maxReplicas $replicas | int64 -}}
{{- if gt $least $most -}}
{{- fail (printf "groups.%s.minReplicas = %d is more than its maxReplicas = %d: lower the one or raise the other" $name $least $most) -}}
{{- end -}}
{{- if or (lt $replicas $least) (gt $replicas $most) -}}
{{- fail (printf "groups.%s.replicas = %d is not between its minReplicas = %d and maxReplicas = %d" $name $replicas $least $most) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if not $count -}}
{{- fail "groups is empty: the head runs no actors, so at least one group is needed" -}}
{{- end -}}
{{- end }}

{{- define "stage-ray.rules.pods" -}}
{{- if lt (int64 .Values.terminationGracePeriodSeconds) (add 15 (int64 .Values.drainSeconds)) -}}
{{- fail (printf "terminationGracePeriodSeconds = %d is less than drainSeconds = %d and 15 s for Ray to end: a pod would be killed while it saves, so raise it" (int64 .Values.terminationGracePeriodSeconds) (int64 .Values.drainSeconds)) -}}
{{- end -}}
{{- with .Values.storage -}}
{{- if eq .checkpoints.mountPath .hfCache.mountPath -}}
{{- fail (printf "storage.checkpoints.mountPath and storage.hfCache.mountPath are both %s: give each volume a path of its own" .checkpoints.mountPath) -}}
{{- end -}}
{{- end -}}
{{- include "stage-ray.rules.env" (dict "key" "extraEnv" "env" .Values.extraEnv) -}}
{{- include "stage-ray.rules.part" (dict "root" . "key" "head" "part" .Values.head) -}}
{{- range $name, $group := .Values.groups -}}
{{- if $group -}}
{{- include "stage-ray.rules.part" (dict "root" $ "key" (printf "groups.%s" $name) "part" $group) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Arguments: root, key (head or groups.NAME), part (its values). */}}
{{- define "stage-ray.rules.part" -}}
{{- $key := .key -}}
{{- with .part -}}
{{- if gt (int64 (include "stage-ray.bytes" .shm)) (int64 (include "stage-ray.bytes" .memory)) -}}
{{- fail (printf "%s.shm = %s is more than %s.memory = %s, which it is part of: raise the memory" $key .shm $key .memory) -}}
{{- end -}}
{{- if ge (int64 (include "stage-ray.bytes" .objectStore)) (int64 (include "stage-ray.bytes" .shm)) -}}
{{- fail (printf "%s.objectStore = %s does not fit into %s.shm = %s: NCCL and loaders need some of it too, so raise shm" $key .objectStore $key .shm) -}}
{{- end -}}
{{- if lt (int64 (include "stage-ray.bytes" .objectStore)) 78643200 -}}
{{- fail (printf "%s.objectStore = %s: Ray wants 75Mi at least" $key .objectStore) -}}
{{- end -}}
{{- $ours := dict "num-cpus" "cpu" "num-gpus" "gpus" "memory" "memory" "resources" "rayResources" "labels" "rayLabels" "object-store-memory" "objectStore" -}}
{{- range $name, $value := .rayStartParams -}}
{{- if hasKey $ours $name -}}
{{- $where := eq $key "head" | ternary "the head offers Ray nothing, it runs no actors" (printf "use %s.%s" $key (get $ours $name)) -}}
{{- if and (eq $key "head") (has $name (list "object-store-memory" "memory")) -}}{{- $where = printf "use head.%s" (get $ours $name) -}}{{- end -}}
{{- fail (printf "%s.rayStartParams.%s = %s is set by the chart, and KubeRay refuses it twice: %s" $key $name $value $where) -}}
{{- end -}}
{{- end -}}
{{- range $name, $value := .labels -}}
{{- if or (hasPrefix "ray.io/" $name) (has $name (list "app.kubernetes.io/instance" "app.kubernetes.io/part-of" "app.kubernetes.io/component")) -}}
{{- fail (printf "%s.labels: %s = %s is set by the chart or the operator, which select pods by it: take another name" $key $name $value) -}}
{{- end -}}
{{- end -}}
{{- if hasKey (.annotations | default dict) "checksum/config" -}}
{{- fail (printf "%s.annotations: checksum/config is set by the chart: take another name" $key) -}}
{{- end -}}
{{- include "stage-ray.rules.env" (dict "key" (printf "%s.extraEnv" $key) "env" .extraEnv) -}}
{{- end -}}
{{- include "stage-ray.rules.volumes" . -}}
{{- end }}

{{/* Arguments: key, env (a list). */}}
{{- define "stage-ray.rules.env" -}}
{{- range .env -}}
{{- if has .name (list "RAY_AUTH_MODE" "RAY_AUTH_TOKEN") -}}
{{- fail (printf "%s: %s is set by the operator: use auth.mode and auth.existingSecret" $.key .name) -}}
{{- else if eq .name "RAY_enable_autoscaler_v2" -}}
{{- fail (printf "%s: %s is set by the operator: use autoscaling.enabled and autoscaling.version" $.key .name) -}}
{{- else if has .name (list "RAY_REDIS_ADDRESS" "REDIS_PASSWORD" "REDIS_USERNAME") -}}
{{- fail (printf "%s: %s is for Ray's fault tolerance with Redis, which this chart leaves out: a run goes on from its checkpoint on a new cluster" $.key .name) -}}
{{- else if has .name (list "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S" "RAY_JOB_STOP_WAIT_TIME_S") -}}
{{- fail (printf "%s: %s is set by the chart: use drainSeconds" $.key .name) -}}
{{- else if eq .name "HF_HOME" -}}
{{- fail (printf "%s: HF_HOME is set by the chart: use storage.hfCache.mountPath" $.key) -}}
{{- else if eq .name "NVIDIA_VISIBLE_DEVICES" -}}
{{- fail (printf "%s: NVIDIA_VISIBLE_DEVICES is set by the chart (pods without GPUs) and the device plugin: use groups.*.gpus" $.key) -}}
{{- else if has .name (list "HOME" "USER") -}}
{{- fail (printf "%s: %s is set by the chart, to a place that every podSecurity.runAsUser can write to: take it out" $.key .name) -}}
{{- else if has .name (list "RAY_ENABLE_UV_RUN_RUNTIME_ENV" "RAY_USAGE_STATS_ENABLED") -}}
{{- fail (printf "%s: %s is set by the chart: take it out" $.key .name) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "stage-ray.rules.volumes" -}}
{{- $storage := .root.Values.storage -}}
{{- $taken := list "/dev/shm" "/etc/stage-ray" $storage.checkpoints.mountPath $storage.hfCache.mountPath -}}
{{- $allowed := list "name" "configMap" "csi" "downwardAPI" "emptyDir" "ephemeral" "persistentVolumeClaim" "projected" "secret" -}}
{{- range .part.extraVolumes -}}
{{- if has .name (list "dev-shm" "config" "checkpoints" "hf-cache" "autoscaler-token" "ray-logs" "shared-mem") -}}
{{- fail (printf "%s.extraVolumes: the name %s is the chart's or the operator's own: take another" $.key .name) -}}
{{- end -}}
{{- range $source, $_ := . -}}
{{- if not (has $source $allowed) -}}
{{- fail (printf "%s.extraVolumes: %s is refused in a restricted namespace: use a persistentVolumeClaim" $.key $source) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range .part.extraVolumeMounts -}}
{{- if has (trimSuffix "/" .mountPath) $taken -}}
{{- fail (printf "%s.extraVolumeMounts: %s is mounted by the chart: take another path" $.key .mountPath) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "stage-ray.rules.monitoring" -}}
{{- with .Values.monitoring -}}
{{- if and .grafanaDashboard.enabled (not .grafanaDashboard.json) -}}
{{- fail "monitoring.grafanaDashboard.json is empty: add --set-file monitoring.grafanaDashboard.json=deploy/grafana/stage-ray.json" -}}
{{- end -}}
{{- if .grafanaDashboard.enabled -}}
{{- if hasKey (fromJson .grafanaDashboard.json) "Error" -}}
{{- fail (printf "monitoring.grafanaDashboard.json is not JSON: %s" (get (fromJson .grafanaDashboard.json) "Error")) -}}
{{- end -}}
{{- end -}}
{{- if .prometheusRule.enabled -}}
{{- if not (hasKey (fromYaml .prometheusRule.rules) "groups") -}}
{{- fail "monitoring.prometheusRule.rules holds no groups of rules: add --set-file monitoring.prometheusRule.rules=deploy/grafana/alerts.yaml" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}
