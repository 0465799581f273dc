{{/* The run's config beside the pods: a role that no pod can take would wait until cluster.start_timeout_s. The keys
     themselves are checked by the run (stage_ray/config/schema.py), before it asks for anything. */}}

{{- define "stage-ray.rules.run" -}}
{{- $config := include "stage-ray.config" . | fromYaml -}}
{{- if hasKey $config "Error" -}}
{{- fail (printf "configFile is not a YAML mapping: %s" $config.Error) -}}
{{- end -}}
{{- $cluster := $config.cluster | default dict -}}
{{- $address := $cluster.address | default "auto" -}}
{{- if ne $address "auto" -}}
{{- fail (printf "config.cluster.address = %s would leave these pods idle: take it out, the run finds the cluster that it runs in" $address) -}}
{{- end -}}
{{- if .Values.monitoring.podMonitor.enabled -}}
{{- $host := $cluster.metrics_host | default "127.0.0.1" -}}
{{- if or (hasPrefix "127." $host) (eq $host "localhost") (eq $host "::1") -}}
{{- fail (printf "config.cluster.metrics_host = %s: Prometheus cannot reach it in the pod; set 0.0.0.0, or monitoring.podMonitor.enabled=false" $host) -}}
{{- end -}}
{{- if not $cluster.metrics_port -}}
{{- fail (printf "config.cluster.metrics_port = %v is no port that Prometheus could know: set one, such as 9400, or monitoring.podMonitor.enabled=false" $cluster.metrics_port) -}}
{{- end -}}
{{- end -}}
{{- $port := $cluster.metrics_port | default 0 | int -}}
{{- if has $port (list 6379 8080 8265 10001 44217 44227 52365) -}}
{{- fail (printf "config.cluster.metrics_port = %d is one of Ray's own ports in the head's pod: take another, such as 9400" $port) -}}
{{- end -}}
{{- if eq .Values.mode "job" -}}
{{- range $role := include "stage-ray.roles" $config | fromYamlArray -}}
{{- include "stage-ray.rules.role" (dict "root" $ "role" $role) -}}
{{- end -}}
{{- include "stage-ray.rules.total" (dict "root" . "config" $config) -}}
{{- $groups := ($config.rollout | default dict).groups_per_step | default 8 | int64 -}}
{{- $ranks := ($config.learner | default dict).ranks | int64 | max 1 -}}
{{- if mod $groups $ranks -}}
{{- fail (printf "config.learner.ranks = %d does not divide config.rollout.groups_per_step = %d: every rank trains as many whole groups as the others" $ranks $groups) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Actors that the run cannot begin without, so many of them together on one pod; defaults are those of
     stage_ray/config/schema.py. Argument: the config. */}}
{{- define "stage-ray.roles" -}}
{{- $rollout := .rollout | default dict -}}
{{- $scoring := .scoring | default dict -}}
{{- $learner := .learner | default dict -}}
{{- $parallel := $rollout.tensor_parallel | int64 | max 1 -}}
{{- $actors := mul ($rollout.workers | default 1 | int64) $parallel -}}
{{- $workers := gt $parallel 1 | ternary (printf "workers, tensor_parallel = %d on one pod" $parallel) "workers" -}}
{{- $roles := list
  (dict "key" "rollout" "count" $workers "actors" $actors "together" $parallel "cpus" ($rollout.cpus | default 1) "gpus" ($rollout.gpus | default 0) "resources" ($rollout.resources | default dict))
  (dict "key" "scoring" "count" "workers" "actors" ($scoring.workers | default 1 | int64) "together" 1 "cpus" ($scoring.cpus | default 0.5) "gpus" ($scoring.gpus | default 0) "resources" ($scoring.resources | default dict))
  (dict "key" "learner" "count" "ranks" "actors" ($learner.ranks | default 1 | int64) "together" 1 "cpus" ($learner.cpus | default 1) "gpus" ($learner.gpus | default 0) "resources" ($learner.resources | default dict))
-}}
{{- toYaml $roles -}}
{{- end }}

{{/* Pods of a group, as many as there may be. Arguments: root, group. */}}
{{- define "stage-ray.podsOf" -}}
{{- if and .root.Values.autoscaling.enabled (hasKey .group "maxReplicas") -}}
{{- .group.maxReplicas | int64 -}}
{{- else -}}
{{- .group.replicas | int64 -}}
{{- end -}}
{{- end }}

{{/* Whole CPUs that Ray counts on a pod: the operator rounds up. Argument: cpu, such as 8 or 500m. */}}
{{- define "stage-ray.cpus" -}}
{{- $text := toString . -}}
{{- if hasSuffix "m" $text -}}
{{- divf (trimSuffix "m" $text) 1000 | ceil | int64 -}}
{{- else -}}
{{- float64 $text | ceil | int64 -}}
{{- end -}}
{{- end }}

{{/* How often asked goes into offered. Arguments: offered, asked. */}}
{{- define "stage-ray.times" -}}
{{- floor (addf (divf .offered .asked) 0.000001) | int64 -}}
{{- end }}

{{/* Arguments: root, role (one of stage-ray.roles). */}}
{{- define "stage-ray.rules.role" -}}
{{- $role := .role -}}
{{- $root := .root -}}
{{- $places := 0 -}}
{{- $offers := list -}}
{{- range $name, $group := $root.Values.groups -}}
{{- if $group -}}
{{- $offered := $group.rayResources | default dict -}}
{{- $slots := include "stage-ray.times" (dict "offered" (include "stage-ray.cpus" $group.cpu) "asked" $role.cpus) | int64 -}}
{{- if $role.gpus -}}
{{- $slots = min $slots (include "stage-ray.times" (dict "offered" ($group.gpus | default 0) "asked" $role.gpus) | int64) -}}
{{- end -}}
{{- $all := true -}}
{{- range $resource, $asked := $role.resources -}}
{{- if not (hasKey $offered $resource) -}}
{{- $all = false -}}
{{- else if $asked -}}
{{- $slots = min $slots (include "stage-ray.times" (dict "offered" (get $offered $resource) "asked" $asked) | int64) -}}
{{- end -}}
{{- end -}}
{{- if $all -}}
{{- $offers = append $offers $name -}}
{{- $slots = mul (div $slots $role.together) $role.together -}}
{{- $places = add $places (mul $slots (include "stage-ray.podsOf" (dict "root" $root "group" $group) | int64)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if not $offers -}}
{{- fail (printf "config.%s.resources = %s is offered by no group: add it to the rayResources of one, or take it out" $role.key (toJson $role.resources)) -}}
{{- end -}}
{{- if gt (int64 $role.actors) (int64 $places) -}}
{{- fail (printf "config.%s asks for %d actors (%s) of %v CPUs, %v GPUs and %s each, and the pods of groups.%s have room for %d: raise replicas, or ask for less" $role.key (int64 $role.actors) $role.count $role.cpus $role.gpus (toJson $role.resources) (join ", groups." $offers) $places) -}}
{{- end -}}
{{- end }}

{{/* All roles together; each alone has been looked at. Arguments: root, config. */}}
{{- define "stage-ray.rules.total" -}}
{{- $root := .root -}}
{{- $offered := dict "cpus" 0.0 "gpus" 0.0 -}}
{{- range $name, $group := $root.Values.groups -}}
{{- if $group -}}
{{- $pods := include "stage-ray.podsOf" (dict "root" $root "group" $group) | int64 -}}
{{- $_ := set $offered "cpus" (addf $offered.cpus (mul $pods (include "stage-ray.cpus" $group.cpu | int64))) -}}
{{- $_ := set $offered "gpus" (addf $offered.gpus (mul $pods ($group.gpus | default 0 | int64))) -}}
{{- end -}}
{{- end -}}
{{- range $unit := list "cpus" "gpus" -}}
{{- $asked := 0.0 -}}
{{- range include "stage-ray.roles" $.config | fromYamlArray -}}
{{- $asked = addf $asked (mulf .actors (get . $unit)) -}}
{{- end -}}
{{- if gt $asked (addf (get $offered $unit) 0.000001) -}}
{{- fail (printf "config asks for %v %s in all (rollout.workers, scoring.workers, learner.ranks), and the pods of groups have %v: raise replicas, or ask for less" $asked (upper $unit | replace "S" "s") (get $offered $unit)) -}}
{{- end -}}
{{- end -}}
{{- end }}
