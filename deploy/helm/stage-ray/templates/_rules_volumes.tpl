{{/* Volumes: what a restricted namespace refuses, and two things mounted at one path, of which a pod would see one. */}}

{{/* All pods mount both claims, so these must admit pods on as many nodes as there may be. */}}
{{- define "stage-ray.rules.claims" -}}
{{- range $name, $mend := dict "checkpoints" "" "hfCache" ", or storage.hfCache.enabled=false" -}}
{{- $claim := get $.Values.storage $name -}}
{{- $says := printf "storage.%s.accessModes = %s" $name (toJson $claim.accessModes) -}}
{{- if and (ne (toString $claim.enabled) "false") (not (has "ReadWriteMany" $claim.accessModes)) -}}
{{- if has "ReadOnlyMany" $claim.accessModes -}}
{{- if not $claim.existingClaim -}}
{{- fail (printf "%s: a new claim would stay empty; name one that has the weights in storage.%s.existingClaim, or use ReadWriteMany" $says $name) -}}
{{- end -}}
{{- else if not (has "ReadWriteOnce" $claim.accessModes) -}}
{{- fail (printf "%s lets one pod mount it, and head and workers all do: use ReadWriteMany, with a storage class that has it%s" $says $mend) -}}
{{- else if not (include "stage-ray.oneNode" $) -}}
{{- fail (printf "%s lets the pods of one node mount it, and head and workers may run on several: use ReadWriteMany, with a storage class that has it%s, or keep all pods on one node by a kubernetes.io/hostname in pod.nodeSelector" $says $mend) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Not empty where every pod is bound to the same node, by name or to the others' by a required affinity. */}}
{{- define "stage-ray.oneNode" -}}
{{- $host := "kubernetes.io/hostname" -}}
{{- $nodes := list -}}
{{- range $key, $part := include "stage-ray.parts" . | fromJson -}}
{{- $pod := include "stage-ray.rayPod" (dict "root" $ "part" $part "name" $key "head" (eq $key "head")) | fromJson -}}
{{- $node := dig "nodeSelector" $host "" $pod -}}
{{- range dig "affinity" "podAffinity" "requiredDuringSchedulingIgnoredDuringExecution" list $pod -}}
{{- if eq .topologyKey $host -}}{{- $node = $node | default "the others'" -}}{{- end -}}
{{- end -}}
{{- $nodes = append $nodes $node | uniq -}}
{{- end -}}
{{- if eq (len $nodes) 1 }}{{ first $nodes }}{{ end -}}
{{- end }}

{{/* Arguments: root, key (head or groups.NAME), part (its values). */}}
{{- define "stage-ray.rules.volumes" -}}
{{- $restricted := .root.Values.podSecurity.restricted -}}
{{- $pod := .part.pod | default dict -}}
{{- $allowed := list "name" "configMap" "csi" "downwardAPI" "emptyDir" "ephemeral" "persistentVolumeClaim" "projected" "secret" -}}
{{- $own := list "dev-shm" "config" "home" "checkpoints" "hf-cache" "autoscaler-token" "ray-logs" "shared-mem" -}}
{{- $names := list -}}
{{- range $source := list
  (dict "key" "pod.volumes" "volumes" .root.Values.pod.volumes)
  (dict "key" (printf "%s.extraVolumes" .key) "volumes" .part.extraVolumes)
  (dict "key" (printf "%s.pod.volumes" .key) "volumes" $pod.volumes)
-}}
{{- range .volumes -}}
{{- if has .name $own -}}
{{- fail (printf "%s: the name %s is the chart's or the operator's own: take another" $source.key .name) -}}
{{- end -}}
{{- if has .name $names -}}
{{- fail (printf "%s: two volumes are named %s: rename one" $source.key .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- range $type, $_ := . -}}
{{- if and $restricted (not (has $type $allowed)) -}}
{{- fail (printf "%s: %s is refused in a restricted namespace: use a persistentVolumeClaim, or podSecurity.restricted=false" $source.key $type) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- include "stage-ray.rules.mounts" . -}}
{{- end }}

{{/* Values that mount something into Ray's container, and those that such volumes come from. Arguments: as above. */}}
{{- define "stage-ray.mountSources" -}}
{{- $container := .part.container | default dict -}}
{{- toJson (list
  (dict "key" "container.volumeMounts" "mounts" .root.Values.container.volumeMounts "volumes" "pod.volumes")
  (dict "key" (printf "%s.extraVolumeMounts" .key) "mounts" .part.extraVolumeMounts "volumes" (printf "%s.extraVolumes" .key))
  (dict "key" (printf "%s.container.volumeMounts" .key) "mounts" $container.volumeMounts "volumes" (printf "%s.pod.volumes" .key))
) -}}
{{- end }}

{{/* Arguments: as above. */}}
{{- define "stage-ray.rules.mounts" -}}
{{- $seen := dict -}}
{{- range include "stage-ray.mounts" . | fromJsonArray -}}
{{- $mount := . -}}
{{- if hasKey $seen .path -}}
{{- fail (printf "%s: %s is taken by %s: take another path" .by .path (get $seen .path)) -}}
{{- end -}}
{{- $_ := set $seen .path .by -}}
{{- if ne .by "the chart" -}}
{{- range list "/" "/bin" "/etc" "/home" "/lib" "/root" "/sbin" "/usr" "/usr/local" "/var" -}}
{{- if eq $mount.path . -}}
{{- fail (printf "%s: %s would hide what the image has there: take another path, such as /mnt/data" $mount.by .) -}}
{{- end -}}
{{- end -}}
{{- range list "/dev" "/etc/stage-ray" "/home/stage-ray" "/proc" "/sys" "/tmp/ray" -}}
{{- if hasPrefix (printf "%s/" .) (printf "%s/" $mount.path) -}}
{{- fail (printf "%s: %s is inside %s, which the system, Ray or the chart fills: take another path, such as /mnt/data" $mount.by $mount.path .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Every path at which something is mounted in a pod, cleaned (/a//b/ is /a/b), and who mounts it. The chart's first, so
     that a sentence names the value that can be changed. Arguments: as above. */}}
{{- define "stage-ray.mounts" -}}
{{- $mounts := list -}}
{{- range list "/dev/shm" "/etc/stage-ray" "/home/stage-ray" "/tmp/ray" -}}
{{- $mounts = append $mounts (dict "path" . "by" "the chart") -}}
{{- end -}}
{{- $mounts = append $mounts (dict "path" (include "stage-ray.checkpointPath" .root) "by" "storage.checkpoints.mountPath") -}}
{{- $mounts = append $mounts (dict "path" (include "stage-ray.hfCachePath" .root) "by" "storage.hfCache.mountPath") -}}
{{- range $source := include "stage-ray.mountSources" . | fromJsonArray -}}
{{- range .mounts -}}
{{- $mounts = append $mounts (dict "path" (clean .mountPath) "by" (printf "%s (%s)" $source.key .name)) -}}
{{- end -}}
{{- end -}}
{{- toJson $mounts -}}
{{- end }}
