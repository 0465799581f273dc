{{/* What must not be. Each sentence names the key, its value and what to do instead. First: what KubeRay's operator and
     Kueue refuse although the schema of the custom resource admits it. Pods are in _rules_pods.tpl, the run in
     _rules_run.tpl. */}}

{{- define "stage-ray.rules" -}}
{{- include "stage-ray.rules.names" . -}}
{{- include "stage-ray.rules.cluster" . -}}
{{- if eq .Values.mode "job" -}}
{{- include "stage-ray.rules.job" . -}}
{{- end -}}
{{- include "stage-ray.rules.kueue" . -}}
{{- include "stage-ray.rules.groups" . -}}
{{- include "stage-ray.rules.pods" . -}}
{{- include "stage-ray.rules.claims" . -}}
{{- include "stage-ray.rules.monitoring" . -}}
{{- include "stage-ray.rules.run" . -}}
{{- end }}

{{- define "stage-ray.rules.names" -}}
{{- $name := include "stage-ray.name" . -}}
{{- $longest := eq .Values.mode "job" | ternary 47 53 | int -}}
{{- if gt (len $name) $longest -}}
{{- fail (printf "fullnameOverride (or the release's name) = %s has %d characters, and a name in mode %s may have %d: shorten it" $name (len $name) .Values.mode $longest) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- fail (printf "fullnameOverride (or the release's name) = %s: KubeRay wants lower-case letters, digits and -, a letter first and no - last" $name) -}}
{{- end -}}
{{- with .Values.image -}}
{{- if not .repository -}}
{{- fail "image.repository is empty: name the image that deploy/docker/Dockerfile made, such as registry.example.com/stage-ray" -}}
{{- end -}}
{{- if not (or .tag .digest) -}}
{{- fail "image.tag and image.digest are both empty: give one of them, there is no latest" -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "stage-ray.rules.cluster" -}}
{{- $ray := semver .Values.rayVersion -}}
{{- if and (eq .Values.auth.mode "token") (lt ($ray.Compare (semver "2.52.0")) 0) -}}
{{- fail (printf "auth.mode = token needs Ray 2.52 or later, and rayVersion = %s: use a newer image, or auth.mode=disabled" .Values.rayVersion) -}}
{{- end -}}
{{- if and .Values.auth.existingSecret (ne .Values.auth.mode "token") -}}
{{- fail (printf "auth.existingSecret = %s is not used with auth.mode = %s: set auth.mode=token" .Values.auth.existingSecret .Values.auth.mode) -}}
{{- end -}}
{{- range $name, $group := .Values.groups -}}
{{- if $group -}}
{{- range $key := list "priority" "idleTimeoutSeconds" -}}
{{- if hasKey $group $key -}}
{{- if not $.Values.autoscaling.enabled -}}
{{- fail (printf "groups.%s.%s = %v is for the autoscaler: set autoscaling.enabled=true, or take it out" $name $key (get $group $key)) -}}
{{- else if ne $.Values.autoscaling.version "v2" -}}
{{- fail (printf "groups.%s.%s = %v needs autoscaling.version = v2, not %s" $name $key (get $group $key) $.Values.autoscaling.version) -}}
{{- else if and (eq $key "priority") (lt ($ray.Compare (semver "2.56.0")) 0) -}}
{{- fail (printf "groups.%s.priority = %v needs Ray 2.56 or later, and rayVersion = %s: use a newer image, or take it out" $name $group.priority $.Values.rayVersion) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "stage-ray.rules.job" -}}
{{- with .Values.job -}}
{{- if eq .submissionMode "SidecarMode" -}}
{{- fail "job.submissionMode = SidecarMode: the operator's container in the head's pod has no security context, so a restricted namespace refuses it; use K8sJobMode or HTTPMode" -}}
{{- else if eq .submissionMode "InteractiveMode" -}}
{{- fail "job.submissionMode = InteractiveMode waits for a job from outside: use mode=cluster and stage-ray submit, or K8sJobMode or HTTPMode" -}}
{{- else if not (has .submissionMode (list "K8sJobMode" "HTTPMode")) -}}
{{- fail (printf "job.submissionMode = %s is none of K8sJobMode and HTTPMode" .submissionMode) -}}
{{- end -}}
{{- if and .shutdownAfterJobFinishes .deletionRules -}}
{{- fail "job.shutdownAfterJobFinishes = true and job.deletionRules exclude each other: set job.shutdownAfterJobFinishes=false and job.ttlSecondsAfterFinished=0, or take the rules out" -}}
{{- end -}}
{{- if and (not .shutdownAfterJobFinishes) .ttlSecondsAfterFinished -}}
{{- fail (printf "job.ttlSecondsAfterFinished = %v needs job.shutdownAfterJobFinishes = true: set that, or the seconds to 0" .ttlSecondsAfterFinished) -}}
{{- end -}}
{{- if and .suspend (not .shutdownAfterJobFinishes) -}}
{{- fail "job.suspend = true needs job.shutdownAfterJobFinishes = true: the operator suspends a job by deleting its cluster" -}}
{{- end -}}
{{- with .runtimeEnvYAML -}}
{{- if hasKey (fromYaml .) "Error" -}}
{{- fail (printf "job.runtimeEnvYAML is not a YAML mapping: %s" (get (fromYaml .) "Error")) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- include "stage-ray.rules.deletion" . -}}
{{- end }}

{{- define "stage-ray.rules.deletion" -}}
{{- $seen := dict -}}
{{- range $i, $rule := .Values.job.deletionRules -}}
{{- $key := printf "job.deletionRules[%d]" $i -}}
{{- $when := "" -}}
{{- with $rule.condition -}}
{{- if and .jobStatus .jobDeploymentStatus -}}
{{- fail (printf "%s.condition has both jobStatus and jobDeploymentStatus: keep one of them" $key) -}}
{{- end -}}
{{- $when = .jobStatus | default .jobDeploymentStatus | default "" -}}
{{- end -}}
{{- if not $when -}}
{{- fail (printf "%s.condition has neither jobStatus nor jobDeploymentStatus: give one of them" $key) -}}
{{- end -}}
{{- if and (eq $rule.policy "DeleteWorkers") $.Values.autoscaling.enabled -}}
{{- fail (printf "%s.policy = DeleteWorkers does not go with autoscaling.enabled = true: use DeleteCluster" $key) -}}
{{- end -}}
{{- $same := get $seen $when | default dict -}}
{{- if hasKey $same $rule.policy -}}
{{- fail (printf "%s repeats the rule %s for %s: keep one of them" $key $rule.policy $when) -}}
{{- end -}}
{{- $_ := set $seen $when (set $same $rule.policy ($rule.condition.ttlSeconds | default 0 | int64)) -}}
{{- end -}}
{{- range $when, $ttls := $seen -}}
{{- $earlier := "" -}}
{{- range $policy := list "DeleteWorkers" "DeleteCluster" "DeleteSelf" -}}
{{- if hasKey $ttls $policy -}}
{{- if and $earlier (lt (int64 (get $ttls $policy)) (int64 (get $ttls $earlier))) -}}
{{- fail (printf "job.deletionRules for %s: %s after %d s comes before %s after %d s; give it at least as many seconds" $when $policy (get $ttls $policy | int64) $earlier (get $ttls $earlier | int64)) -}}
{{- end -}}
{{- $earlier = $policy -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "stage-ray.rules.kueue" -}}
{{- with .Values.kueue -}}
{{- if and .priorityClass (not .queueName) -}}
{{- fail (printf "kueue.priorityClass = %s means nothing without kueue.queueName: name the queue" .priorityClass) -}}
{{- end -}}
{{- if .queueName -}}
{{- if $.Values.autoscaling.enabled -}}
{{- fail (printf "kueue.queueName = %s and autoscaling.enabled = true: Kueue admits a fixed size only, so take one of them out" .queueName) -}}
{{- end -}}
{{- if and (eq $.Values.mode "job") (not $.Values.job.shutdownAfterJobFinishes) -}}
{{- fail (printf "kueue.queueName = %s needs job.shutdownAfterJobFinishes = true, so that the job gives back what it was granted" .queueName) -}}
{{- end -}}
{{- $groups := 0 -}}
{{- range $.Values.groups -}}{{- if . -}}{{- $groups = add1 $groups -}}{{- end -}}{{- end -}}
{{- if gt (int $groups) 7 -}}
{{- fail (printf "kueue.queueName = %s admits 7 groups at most, and groups has %d: join some" .queueName $groups) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}
