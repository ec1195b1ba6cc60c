{{/* Peers and rules from which network-policies.yaml is put together. */}}

{{/* Pods of a component in the release's namespace. */}}
{{- define "muster.peer" -}}
- namespaceSelector: { matchLabels: { kubernetes.io/metadata.name: {{ .root.Release.Namespace }} } }
  podSelector: { matchLabels: { app.kubernetes.io/name: muster, app.kubernetes.io/component: {{ .component }} } }
{{- end }}

{{/* Worker pods, and those that look at a volume for the controller, wherever they may run. */}}
{{- define "muster.workers" -}}
- namespaceSelector:
    matchExpressions:
      - key: kubernetes.io/metadata.name
        operator: In
        values: {{ (include "muster.workloadNamespaces" . | fromJson).all | toJson }}
  podSelector: { {{- include "muster.workload" . }} }
{{- end }}

{{- define "muster.workload" -}}
matchLabels: { app.kubernetes.io/name: muster }, matchExpressions: [{ key: app.kubernetes.io/component, operator: In, values: [worker, inspect] }]
{{- end }}

{{- define "muster.tcp" -}}
{{- range . }}
- { protocol: TCP, port: {{ . }} }
{{- end }}
{{- end }}

{{/* Names for everybody. */}}
{{- define "muster.dnsRule" -}}
- to: {{ toJson .Values.networkPolicy.dns }}
  ports: [{ protocol: UDP, port: 53 }, { protocol: TCP, port: 53 }]
{{- end }}

{{- define "muster.apiServerRule" -}}
- to: [{{ range $index, $cidr := .Values.networkPolicy.apiServer.cidrs }}{{ if $index }}, {{ end }}{ ipBlock: { cidr: {{ $cidr | quote }} } }{{ end }}]
  ports: {{- include "muster.tcp" .Values.networkPolicy.apiServer.ports | nindent 4 }}
{{- end }}

{{- define "muster.pullRule" -}}
{{- with .Values.networkPolicy.pulls }}
{{- if .enabled }}
- to: [{{ range $index, $block := .cidrs }}{{ if $index }}, {{ end }}{ ipBlock: {{ toJson $block }} }{{ end }}]
  ports: {{- include "muster.tcp" .ports | nindent 4 }}
{{- end }}
{{- end }}
{{- end }}

{{- define "muster.natsRule" -}}
{{- if .Values.nats.externalUrl }}
- ports: [{ protocol: TCP, port: {{ .Values.nats.externalUrl | regexFind "[0-9]+$" | default "4222" }} }]
{{- else }}
- to: {{- include "muster.peer" (dict "root" . "component" "nats") | nindent 4 }}
  ports: [{ protocol: TCP, port: 4222 }]
{{- end }}
{{- end }}

{{- define "muster.leaderRule" -}}
- to: {{- include "muster.peer" (dict "root" . "component" "controller") | nindent 4 }}
  ports: [{ protocol: TCP, port: 7441 }, { protocol: TCP, port: 7442 }]
{{- end }}

{{/* Who reads metrics at a port; nothing where nobody does. */}}
{{- define "muster.monitorRule" -}}
{{- with .root.Values.networkPolicy.monitoring }}
- from: {{ toJson . }}
  ports: [{ protocol: TCP, port: {{ $.port }} }]
{{- end }}
{{- end }}
