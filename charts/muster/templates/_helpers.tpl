{{/* Names, labels and the security that every pod of this chart has. */}}

{{- define "muster.labels" -}}
app.kubernetes.io/name: muster
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/part-of: muster
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "muster.selector" -}}
app.kubernetes.io/name: muster
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "muster.podLabels" -}}
{{ include "muster.selector" . }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/part-of: muster
{{- end }}

{{/* Objects without a namespace carry that of the release: installations in several namespaces do not meet. */}}
{{- define "muster.clusterName" -}}
muster:{{ .root.Release.Namespace }}:{{ .name }}
{{- end }}

{{- define "muster.image" -}}
{{- $tag := .image.tag | default .root.Chart.AppVersion -}}
{{- if .image.digest -}}{{ .image.repository }}@{{ .image.digest }}{{- else -}}{{ .image.repository }}:{{ $tag }}{{- end -}}
{{- end }}

{{/* Where worker pods may run, once each: a list under the key `all`. */}}
{{- define "muster.workloadNamespaces" -}}
{{- $all := list .Values.watchNamespace -}}
{{- if not .Values.watchNamespace }}{{ $all = concat (list .Release.Namespace) .Values.workloadNamespaces | uniq }}{{ end -}}
{{- dict "all" $all | toJson -}}
{{- end }}

{{- define "muster.natsUrl" -}}
{{- .Values.nats.externalUrl | default (printf "tls://muster-nats.%s.svc:4222" .Release.Namespace) -}}
{{- end }}

{{- define "muster.apiKeySecret" -}}
{{- .Values.gateway.apiKeySecret | default "muster-api-key" -}}
{{- end }}

{{- define "muster.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.userId }}
runAsGroup: {{ .Values.userId }}
fsGroup: {{ .Values.userId }}
seccompProfile: { type: RuntimeDefault }
{{- end }}

{{- define "muster.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: { drop: [ALL] }
{{- end }}

{{/* Where a pod may be put: .of is the values of its component. */}}
{{- define "muster.placing" -}}
{{- with .of.nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .of.tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- with .of.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
affinity:
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: kubernetes.io/hostname
          labelSelector:
            matchLabels: {{ include "muster.selector" . | fromYaml | toJson }}
{{- end }}

{{- define "muster.podEnv" -}}
- name: MUSTER_POD_NAME
  valueFrom: { fieldRef: { fieldPath: metadata.name } }
- name: MUSTER_POD_UID
  valueFrom: { fieldRef: { fieldPath: metadata.uid } }
- name: MUSTER_POD_IP
  valueFrom: { fieldRef: { fieldPath: status.podIP } }
{{- end }}

{{/* Binds a role to a service account of the release. .kind and .role: what is bound; .namespace: where, "": in the cluster. */}}
{{- define "muster.binding" -}}
apiVersion: rbac.authorization.k8s.io/v1
kind: {{ if .namespace }}RoleBinding{{ else }}ClusterRoleBinding{{ end }}
metadata:
  name: {{ .name | quote }}
  {{- with .namespace }}
  namespace: {{ . }}
  {{- end }}
  labels: {{- include "muster.labels" (dict "root" .root "component" .account) | nindent 4 }}
roleRef: { apiGroup: rbac.authorization.k8s.io, kind: {{ .kind }}, name: {{ .role | quote }} }
subjects:
  - { kind: ServiceAccount, name: muster-{{ .account }}, namespace: {{ .root.Release.Namespace }} }
{{- end }}
