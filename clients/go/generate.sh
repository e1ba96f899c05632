#!/usr/bin/env bash
# Writes gen/, or the folder given: the protocol's messages and services in Go. PYTHON names an
# interpreter with grpcio-tools and googleapis-common-protos; the repository's own by default.
# The plugins are those of Debian's sources, so that the same protos give the same bytes.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$here/../../.venv/bin/python}
protos=$here/../../protos
out=${1:-$here/gen}
module=millrace.io/millrace/gen
bin=$here/build/bin
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

for plugin in google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc; do
  CGO_ENABLED=0 "$here/offline.sh" build -o "$bin/" "$plugin"
done
files=()
packages=()
for name in engine compiler runtime; do
  file=millrace/$name/v1/$name.proto
  files+=("$file")
  packages+=("--go_opt=M$file=$module/millrace/$name/v1;${name}v1")
done
rm -rf "$out/millrace"
mkdir -p "$out"
"$python" -m grpc_tools.protoc -I "$protos" -I "$site" \
  --plugin="$bin/protoc-gen-go" --go_out="$out" --go_opt="module=$module" "${packages[@]}" \
  --plugin="$bin/protoc-gen-go-grpc" --go-grpc_out="$out" --go-grpc_opt="module=$module" \
  "${packages[@]/#--go_opt=/--go-grpc_opt=}" "${files[@]}"
