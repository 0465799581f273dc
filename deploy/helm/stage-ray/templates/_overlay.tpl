{{/* Values laid over the pods that the chart makes: those for all pods first, then those of head or group. */}}

{{/* One map of several, as JSON, later ones over earlier: maps are merged, everything else is replaced. With `join` lists
     at the top are joined, but for items of the same name or mount path, of which the last one stays. (Helm's
     mergeOverwrite would drop a false or 0.) Arguments: maps (a list), join (true or absent). */}}
{{- define "stage-ray.overlay" -}}
{{- $result := dict -}}
{{- range $map := .maps -}}
{{- range $key, $value := $map -}}
{{- $old := get $result $key -}}
{{- if and (kindIs "map" $value) (kindIs "map" $old) -}}
{{- $value = include "stage-ray.overlay" (dict "maps" (list $old $value)) | fromJson -}}
{{- else if and $.join (kindIs "slice" $value) (kindIs "slice" $old) -}}
{{- $value = include "stage-ray.joined" (concat $old $value) | fromJsonArray -}}
{{- end -}}
{{- $_ := set $result $key $value -}}
{{- end -}}
{{- end -}}
{{- toJson $result -}}
{{- end }}

{{- define "stage-ray.joined" -}}
{{- $items := dict -}}
{{- $order := list -}}
{{- range $i, $item := . -}}
{{- $id := $item.mountPath | default $item.devicePath | default $item.name | default (printf "#%d" $i) -}}
{{- $_ := set $items $id $item -}}
{{- $order = append (without $order $id) $id -}}
{{- end -}}
{{- $joined := list -}}
{{- range $order -}}{{- $joined = append $joined (get $items .) -}}{{- end -}}
{{- toJson $joined -}}
{{- end }}

{{/* The spec of a pod of Ray, as JSON. Arguments: root, part (head or a group), name (of Ray's container), head (true or
     false). */}}
{{- define "stage-ray.rayPod" -}}
{{- $part := .part -}}
{{- $own := include "stage-ray.ownPod" . | fromYaml -}}
{{- $ray := include "stage-ray.rayContainer" (dict "root" .root "part" $part "own" (first $own.containers)) | fromJson -}}
{{- $_ := set $own "containers" (list $ray) -}}
{{- $near := include "stage-ray.scheduling" $part | fromJson -}}
{{- $volumes := dict "volumes" ($part.extraVolumes | default list) -}}
{{- $maps := list $own .root.Values.pod $near $volumes ($part.pod | default dict) -}}
{{- $pod := include "stage-ray.overlay" (dict "maps" $maps "join" true) | fromJson -}}
{{- range $kind := list "containers" "initContainers" -}}
{{- $made := list -}}
{{- range get $pod $kind | default list -}}
{{- $made = append $made (include "stage-ray.besideRay" (dict "container" . "ray" $ray) | fromJson) -}}
{{- end -}}
{{- if $made -}}{{- $_ := set $pod $kind $made -}}{{- end -}}
{{- end -}}
{{- toJson $pod -}}
{{- end }}

{{/* Ray's container, as JSON. What is limited is requested, too: batch schedulers add up requests.
     Arguments: root, part, own (the container as the chart makes it). */}}
{{- define "stage-ray.rayContainer" -}}
{{- $far := dict "env" .root.Values.extraEnv -}}
{{- $near := dict "env" (.part.extraEnv | default list) "volumeMounts" (.part.extraVolumeMounts | default list) -}}
{{- $maps := list .own .root.Values.container $far $near (.part.container | default dict) -}}
{{- $ray := include "stage-ray.overlay" (dict "maps" $maps "join" true) | fromJson -}}
{{- $requests := include "stage-ray.overlay" (dict "maps" (list $ray.resources.limits $ray.resources.requests)) -}}
{{- $_ := set $ray.resources "requests" (fromJson $requests) -}}
{{- toJson $ray -}}
{{- end }}

{{/* A container beside Ray's, as JSON. Without an image it is like Ray's, without GPUs; one with an image has the chart's
     security context beneath its own. Arguments: container, ray. */}}
{{- define "stage-ray.besideRay" -}}
{{- $base := dict -}}
{{- if not .container.image -}}
{{- $base = pick .ray "image" "imagePullPolicy" "securityContext" "envFrom" "volumeMounts" -}}
{{- $void := list (dict "name" "NVIDIA_VISIBLE_DEVICES" "value" "void") -}}
{{- $_ := set $base "env" (include "stage-ray.joined" (concat .ray.env $void) | fromJsonArray) -}}
{{- else if not (has .container.name (list .ray.name "check-volumes")) -}}
{{- $base = dict "securityContext" (include "stage-ray.containerSecurityContext" . | fromYaml) -}}
{{- end -}}
{{- include "stage-ray.overlay" (dict "maps" (list $base .container) "join" true) -}}
{{- end }}

{{/* The submitter goes where the head goes; it follows the log, and nothing else. */}}
{{- define "stage-ray.submitterTemplate" -}}
{{- $own := include "stage-ray.ownSubmitter" . | fromYaml -}}
{{- $near := include "stage-ray.scheduling" .Values.head | fromJson -}}
{{- $maps := list $own -}}
{{- range list .Values.pod $near .Values.head.pod -}}
{{- $maps = append $maps (omit . "containers" "initContainers" "volumes" "resourceClaims" "runtimeClassName") -}}
{{- end -}}
metadata:
  {{- include "stage-ray.podMetadata" (dict "root" . "part" (dict) "role" "submitter") | nindent 2 }}
spec:
  {{- include "stage-ray.overlay" (dict "maps" $maps "join" true) | fromJson | toYaml | nindent 2 }}
{{- end }}
