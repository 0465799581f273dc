{{/* Volumes: what a restricted namespace refuses, and two things mounted at one path, of which a pod would see one. */}}

{{/* Arguments: root, key (head or groups.NAME), part (its values). */}}
{{- define "stage-ray.rules.volumes" -}}
{{- $key := .key -}}
{{- $allowed := list "name" "configMap" "csi" "downwardAPI" "emptyDir" "ephemeral" "persistentVolumeClaim" "projected" "secret" -}}
{{- $own := list "dev-shm" "config" "home" "checkpoints" "hf-cache" "autoscaler-token" "ray-logs" "shared-mem" -}}
{{- $names := list "checkpoints" "hf-cache" -}}
{{- range .part.extraVolumes -}}
{{- if has .name $own -}}
{{- fail (printf "%s.extraVolumes: the name %s is the chart's or the operator's own: take another" $key .name) -}}
{{- end -}}
{{- if has .name $names -}}
{{- fail (printf "%s.extraVolumes: two volumes are named %s: rename one" $key .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- range $source, $_ := . -}}
{{- if not (has $source $allowed) -}}
{{- fail (printf "%s.extraVolumes: %s is refused in a restricted namespace: use a persistentVolumeClaim" $key $source) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range .part.extraVolumeMounts -}}
{{- if not (has .name $names) -}}
{{- fail (printf "%s.extraVolumeMounts: there is no volume %s for %s: add it to %s.extraVolumes" $key .name .mountPath $key) -}}
{{- end -}}
{{- end -}}
{{- include "stage-ray.rules.mounts" . -}}
{{- end }}

{{/* Arguments: as above. */}}
{{- define "stage-ray.rules.mounts" -}}
{{- $seen := dict -}}
{{- range include "stage-ray.mounts" . | fromYamlArray -}}
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
{{- range .part.extraVolumeMounts -}}
{{- $mounts = append $mounts (dict "path" (clean .mountPath) "by" (printf "%s.extraVolumeMounts (%s)" $.key .name)) -}}
{{- end -}}
{{- toYaml $mounts -}}
{{- end }}
