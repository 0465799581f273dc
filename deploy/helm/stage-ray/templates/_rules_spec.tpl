{{/* Values laid over the pods (`pod`, `container`): what has a key of its own, and what Kubernetes would refuse only when
     the operator makes the pod. */}}

{{/* Arguments: at ("", "head." or "groups.NAME."), key (whose sizes these are), gpu (its gpuResource), pod, container. */}}
{{- define "stage-ray.rules.fragment" -}}
{{- $pod := .pod | default dict -}}
{{- $container := .container | default dict -}}
{{- range $name, $mend := dict
  "serviceAccountName" "use serviceAccount.name"
  "terminationGracePeriodSeconds" "use terminationGracePeriodSeconds at the top, beside drainSeconds"
  "restartPolicy" "the operator chooses it: take it out"
-}}
{{- if hasKey $pod $name -}}
{{- fail (printf "%spod.%s = %v: %s" $.at $name (get $pod $name) $mend) -}}
{{- end -}}
{{- end -}}
{{- range $kind := list "containers" "initContainers" -}}
{{- range get $pod $kind | default list -}}
{{- if has .name (list "ray-head" "ray-worker" "autoscaler" "ray-job-submitter" "check-volumes" "wait-gcs-ready") -}}
{{- fail (printf "%spod.%s: the name %s is the chart's or the operator's own: use %scontainer for Ray's, or take another name" $.at $kind .name $.at) -}}
{{- end -}}
{{- include "stage-ray.rules.tokens" (dict "key" (printf "%spod.%s (%s)" $.at $kind .name) "env" .env) -}}
{{- end -}}
{{- end -}}
{{- include "stage-ray.rules.env" (dict "key" (printf "%scontainer.env" .at) "env" $container.env) -}}
{{- range $kind, $amounts := $container.resources | default dict -}}
{{- range $name, $key := dict "cpu" "cpu" "memory" "memory" "nvidia.com/gpu" "gpus" $.gpu "gpus" -}}
{{- if and (kindIs "map" $amounts) (hasKey $amounts $name) -}}
{{- fail (printf "%scontainer.resources.%s: Ray counts %s, so it has a key of its own: use %s.%s" $.at $kind $name (eq $key "gpus" | ternary "groups.*" $.key) $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* A pod of Ray as it comes out. Arguments: root, key (head or groups.NAME), part (its values). */}}
{{- define "stage-ray.rules.spec" -}}
{{- $key := .key -}}
{{- $pod := include "stage-ray.rayPod" (dict "root" .root "part" .part "name" "ray" "head" (eq .key "head")) | fromJson -}}
{{- $volumes := list -}}
{{- range $pod.volumes -}}
{{- if ne .name "autoscaler-token" -}}{{- $volumes = append $volumes .name -}}{{- end -}}
{{- end -}}
{{- range $source := include "stage-ray.mountSources" . | fromJsonArray -}}
{{- range .mounts -}}
{{- if not (has .name $volumes) -}}
{{- fail (printf "%s: there is no volume %s for %s: add it to %s" $source.key .name .mountPath $source.volumes) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $container := concat $pod.containers ($pod.initContainers | default list) -}}
{{- range .volumeMounts -}}
{{- if not (has .name $volumes) -}}
{{- fail (printf "%s.pod: container %s mounts %s at %s, and there is no such volume: add it to %s.pod.volumes" $key $container.name .name .mountPath $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- include "stage-ray.rules.resources" (dict "storage" .root.Values.storage "key" .key "resources" (first $pod.containers).resources) -}}
{{- if .root.Values.podSecurity.restricted -}}
{{- include "stage-ray.rules.restricted" (dict "key" .key "pod" $pod) -}}
{{- end -}}
{{- if and $pod.hostNetwork (ne (toString $pod.dnsPolicy) "ClusterFirstWithHostNet") -}}
{{- fail (printf "%s: pod.hostNetwork = true: workers would not find the head's name; set pod.dnsPolicy=ClusterFirstWithHostNet, too" $key) -}}
{{- end -}}
{{- end }}

{{/* Extended resources and huge pages cannot be overcommitted. Arguments: storage, key, resources. */}}
{{- define "stage-ray.rules.resources" -}}
{{- range $name, $request := .resources.requests -}}
{{- $limit := get $.resources.limits $name -}}
{{- $both := printf "%s: container.resources: %s is requested %v times and limited to %v" $.key $name $request ($limit | default "nothing") -}}
{{- if and (or (contains "/" $name) (hasPrefix "hugepages-" $name)) (ne (toString $request) (toString $limit)) -}}
{{- fail (printf "%s: both must be the same, so give it in limits alone" $both) -}}
{{- end -}}
{{- if eq $name "ephemeral-storage" -}}
{{- $bytes := include "stage-ray.bytes" (toString $request) | int64 -}}
{{- if and $limit (gt $bytes (include "stage-ray.bytes" (toString $limit) | int64)) -}}
{{- fail (printf "%s: container.resources: ephemeral-storage has a request of %v, more than its limit of %v: raise the limit" $.key $request $limit) -}}
{{- end -}}
{{- with $.storage.hfCache -}}
{{- if and (not .enabled) (lt $bytes (include "stage-ray.bytes" .size | int64)) -}}
{{- fail (printf "%s: container.resources: ephemeral-storage has a request of %v, less than storage.hfCache.size = %s, which is on the same disk: raise the request, or lower the size" $.key $request .size) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Arguments: key, pod. */}}
{{- define "stage-ray.rules.restricted" -}}
{{- $mend := "is refused in a restricted namespace: take it out, or set podSecurity.restricted=false" -}}
{{- range $field := list "hostNetwork" "hostPID" "hostIPC" -}}
{{- if get $.pod $field -}}
{{- fail (printf "%s: pod.%s = true %s" $.key $field $mend) -}}
{{- end -}}
{{- end -}}
{{- range prepend (concat .pod.containers (.pod.initContainers | default list)) (dict "name" "the pod" "securityContext" .pod.securityContext) -}}
{{- $whose := .name -}}
{{- with .securityContext -}}
{{- $added := without (dig "capabilities" "add" list .) "NET_BIND_SERVICE" -}}
{{- $unconfined := eq (dig "seccompProfile" "type" "" .) "Unconfined" -}}
{{- $root := or (eq (toString .runAsNonRoot) "false") (eq (toString .runAsUser) "0") -}}
{{- $kept := not (has "ALL" (dig "capabilities" "drop" (list "ALL") .)) -}}
{{- if or .privileged .allowPrivilegeEscalation $added $kept $unconfined $root -}}
{{- fail (printf "%s: securityContext of %s = %s %s" $.key $whose (toJson .) $mend) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}
