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
{{- include "stage-ray.rules.env" (dict "key" "extraEnv" "env" .Values.extraEnv) -}}
{{- include "stage-ray.rules.labels" (dict "key" "labels" "labels" .Values.labels "objects" true) -}}
{{- include "stage-ray.rules.annotations" (dict "key" "annotations" "annotations" .Values.annotations) -}}
{{- include "stage-ray.rules.fragment" (dict "at" "" "key" "groups.*" "gpu" "nvidia.com/gpu" "pod" .Values.pod "container" .Values.container) -}}
{{- range $key, $part := include "stage-ray.parts" . | fromJson -}}
{{- include "stage-ray.rules.part" (dict "root" $ "key" $key "part" $part) -}}
{{- end -}}
{{- end }}

{{/* Head and groups, by their keys in the values. */}}
{{- define "stage-ray.parts" -}}
{{- $parts := dict "head" .Values.head -}}
{{- range $name, $group := .Values.groups -}}
{{- if $group -}}{{- $_ := set $parts (printf "groups.%s" $name) $group -}}{{- end -}}
{{- end -}}
{{- toJson $parts -}}
{{- end }}

{{/* Arguments: root, key (head or groups.NAME), part (its values). */}}
{{- define "stage-ray.rules.part" -}}
{{- $key := .key -}}
{{- $part := .part -}}
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
{{- $ours := include "stage-ray.ownStartParams" $key | fromYaml -}}
{{- range $name, $value := .rayStartParams -}}
{{- if hasKey $ours $name -}}
{{- fail (printf "%s.rayStartParams.%s = %s: %s" $key $name $value (get $ours $name)) -}}
{{- end -}}
{{- end -}}
{{- range $kind := list "labels" "rayLabels" -}}
{{- include "stage-ray.rules.labels" (dict "key" (printf "%s.%s" $key $kind) "labels" (get $part $kind | default dict)) -}}
{{- end -}}
{{- include "stage-ray.rules.annotations" (dict "key" (printf "%s.annotations" $key) "annotations" .annotations) -}}
{{- include "stage-ray.rules.env" (dict "key" (printf "%s.extraEnv" $key) "env" .extraEnv) -}}
{{- include "stage-ray.rules.fragment" (dict "at" (printf "%s." $key) "key" $key "gpu" (.gpuResource | default "nvidia.com/gpu") "pod" .pod "container" .container) -}}
{{- end -}}
{{- include "stage-ray.rules.volumes" . -}}
{{- include "stage-ray.rules.spec" . -}}
{{- end }}

{{/* Arguments: key, labels, objects (whether the RayJob or RayCluster has them, too). */}}
{{- define "stage-ray.rules.labels" -}}
{{- $own := list "app.kubernetes.io/instance" "app.kubernetes.io/part-of" "app.kubernetes.io/component" -}}
{{- if .objects -}}
{{- $own = concat $own (list "app.kubernetes.io/managed-by" "app.kubernetes.io/version" "helm.sh/chart") -}}
{{- end -}}
{{- $read := list "ray.io/gang-scheduling-enabled" "ray.io/priority-class-name" -}}
{{- range $name, $value := .labels -}}
{{- if has $name $read -}}
{{- if not $.objects -}}
{{- fail (printf "%s: %s = %s is read on the RayJob or RayCluster: use labels" $.key $name $value) -}}
{{- end -}}
{{- else if or (hasPrefix "ray.io/" $name) (has $name $own) -}}
{{- fail (printf "%s: %s = %s is set by the chart or the operator: take another name" $.key $name $value) -}}
{{- else if eq $name "kueue.x-k8s.io/queue-name" -}}
{{- fail (printf "%s: %s = %s would make Kueue queue every pod by itself: use kueue.queueName" $.key $name $value) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Arguments: key, annotations. */}}
{{- define "stage-ray.rules.annotations" -}}
{{- range $name, $value := .annotations -}}
{{- if or (eq $name "checksum/config") (hasPrefix "ray.io/" $name) -}}
{{- fail (printf "%s: %s is set by the chart or the operator: take another name" $.key $name) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* What of `ray start` the chart or the operator sets or relies on, with what to use instead. Argument: head or
     groups.NAME. */}}
{{- define "stage-ray.ownStartParams" -}}
{{- $port := "the operator, the Service, probes and policies look for Ray's own port: take it out" -}}
{{- $set := "the operator sets it: take it out" -}}
{{- $redis := "fault tolerance with Redis is left out: a run goes on from its checkpoint on a new cluster; take it out" -}}
{{- $own := dict
  "object-store-memory" (printf "use %s.objectStore" .)
  "plasma-directory" (printf "objects lie in /dev/shm: use %s.shm and %s.objectStore" . .)
  "memory" (printf "use %s.memory" .)
  "address" $set "block" $set "no-monitor" $set "head" $set
  "redis-password" $redis "redis-username" $redis "redis-shard-ports" $redis
  "port" $port "dashboard-port" $port "dashboard-agent-listen-port" $port "metrics-export-port" $port
  "dashboard-host" "the operator asks the dashboard from outside the pod, networkPolicy says who else may: take it out"
  "include-dashboard" "the operator submits jobs to the dashboard: take it out"
-}}
{{- if eq . "head" -}}
{{- range list "num-cpus" "num-gpus" "resources" "labels" -}}
{{- $_ := set $own . "the head offers Ray nothing, it runs no actors: take it out" -}}
{{- end -}}
{{- else -}}
{{- range $name, $key := dict "num-cpus" "cpu" "num-gpus" "gpus" "resources" "rayResources" "labels" "rayLabels" -}}
{{- $_ := set $own $name (printf "use %s.%s" $ $key) -}}
{{- end -}}
{{- end -}}
{{- toYaml $own -}}
{{- end }}

{{/* Arguments: key, env (a list). */}}
{{- define "stage-ray.rules.env" -}}
{{- $auth := "is set by the operator: use auth.mode and auth.existingSecret" -}}
{{- $redis := "is for Ray's fault tolerance with Redis, which this chart leaves out: a run goes on from its checkpoint on a new cluster" -}}
{{- $home := "is set by the chart, to a place that every podSecurity.runAsUser can write to: take it out" -}}
{{- $chart := "is set by the chart: take it out" -}}
{{- $own := dict
  "RAY_AUTH_MODE" $auth "RAY_AUTH_TOKEN" $auth
  "RAY_ENABLE_K8S_TOKEN_AUTH" "asks Kubernetes about every token, which KubeRay does not support for a RayJob: use auth.mode"
  "RAY_enable_autoscaler_v2" "is set by the operator: use autoscaling.enabled and autoscaling.version"
  "RAY_REDIS_ADDRESS" $redis "REDIS_PASSWORD" $redis "REDIS_USERNAME" $redis
  "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S" "is set by the chart: use drainSeconds"
  "RAY_JOB_STOP_WAIT_TIME_S" "is set by the chart: use drainSeconds"
  "HF_HOME" "is set by the chart: use storage.hfCache.mountPath"
  "HF_HUB_OFFLINE" "is set by the chart: use huggingFace.offline"
  "NVIDIA_VISIBLE_DEVICES" "is set by the chart (pods without GPUs) and the device plugin: use groups.*.gpus"
  "HOME" $home "USER" $home
  "RAY_ENABLE_UV_RUN_RUNTIME_ENV" $chart "RAY_USAGE_STATS_ENABLED" $chart
-}}
{{- range .env -}}
{{- if hasKey $own .name -}}
{{- fail (printf "%s: %s %s" $.key .name (get $own .name)) -}}
{{- end -}}
{{- end -}}
{{- include "stage-ray.rules.tokens" . -}}
{{- end }}

{{/* Arguments: key, env (a list). */}}
{{- define "stage-ray.rules.tokens" -}}
{{- range .env -}}
{{- if and .value (regexMatch "(TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)$" .name) -}}
{{- fail (printf "%s: a value of %s would be readable in the release: name a Secret in huggingFace, secretEnv or valueFrom" $.key .name) -}}
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
